"""Credit of the messages of one path, by name: every method is an estimate that asks for values and returns one record.

A question is a coalition of agents, or a number of messages of the path that are kept; who answers it, and under which value
function, is another's business (orchestration.replay). M messages of the path, P agents of the team.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mas_hpc.credit_assignment.error_localization import Fault, fault_by_value, first_error_by_value
from mas_hpc.credit_assignment.estimate import Estimate
from mas_hpc.credit_assignment.message_rewards import (
    FailureRewards,
    MessageRewardSettings,
    failure_rewards,
    message_rewards,
    success_rewards,
)
from mas_hpc.credit_assignment.shapley import Attribution, leave_one_out, shapley
from mas_hpc.types import Turn

CreditMethod = Literal["local", "outcome", "loo", "shapley", "first_error", "process_reward", "reward_blame"]
Question: TypeAlias = frozenset[str] | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """What a credit method knows of an episode before it asks anything.

    Example: Path(turns=trace.path, players=("solver", "critic", "reviser", "verifier"), outcome=0.0)
    """

    turns: tuple[Turn, ...]
    players: tuple[str, ...]
    """All agents of the team, whether they spoke or not."""
    outcome: float
    """1.0 right, 0.0 wrong."""
    scores: tuple[float, ...] = ()
    """One a message, from a process reward model: in (0, 1), nan where it has none; empty without a model."""
    localized: bool = False
    """Whether something else than values has looked for the first error (checks of the text, a PRM, a judge)."""
    fault: Fault | None = None
    """What it found; None if it found none."""
    settings: MessageRewardSettings = field(default_factory=MessageRewardSettings)
    seed: int = 0

    @property
    def agents(self) -> tuple[str, ...]:
        """Who wrote each message."""
        return tuple(turn.agent for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What the messages of a path earned.

    Example: Credit(rewards=(0.5, 0.0, 0.5, 0.0), attribution=attribution).rewards[0] == 0.5
    """

    rewards: tuple[float, ...]
    """One a message; nan where the method has no value for it."""
    attribution: Attribution | None = None
    """Of the agents, where the method has one."""
    unplaced: float = 0.0
    """Credit of agents without a message on this path (others' replays heard them): no message can carry it."""
    residual: float = 0.0
    """Of reward_blame after a success, outcome - v(nobody) - sum(rewards): what is unplaced, and the luck of this episode
    against the mean of its replays, which is 0 where v(everybody) is this episode (masked, resample)."""
    values: tuple[float, ...] = ()
    """Of the M + 1 prefixes, where the method asked for all of them."""
    failure: FailureRewards | None = None
    """Who is blamed, where the method looked for a first error."""
    fault: Fault | None = None
    """The first error with its evidence."""


def outcome(path: Path) -> Estimate[Question, Credit]:
    """Everybody earns the outcome: what GRPO broadcasts."""
    yield from ()
    return Credit(rewards=(path.outcome,) * len(path.turns))


def local(path: Path) -> Estimate[Question, Credit]:
    """Every message earns its role's verifiable reward."""
    yield from ()
    return Credit(rewards=tuple(math.nan if turn.local_reward is None else turn.local_reward for turn in path.turns))


def process_reward(path: Path) -> Estimate[Question, Credit]:
    """Every message earns the score that a process reward model gives its worst step."""
    yield from ()
    assert len(path.scores) == len(path.turns), f"{len(path.scores)} scores of {len(path.turns)} messages"
    return Credit(rewards=path.scores)


def loo(path: Path) -> Estimate[Question, Credit]:
    """v(everybody) - v(everybody else), split evenly among an agent's messages; not conserving.

    Where the value function is `resample` this is C3's advantage of the recorded messages (arXiv 2603.06859).
    """
    return _split(path, (yield from leave_one_out(path.players)))


def shapley_value(path: Path) -> Estimate[Question, Credit]:
    """The Shapley value of every agent, split evenly among its messages, whatever the outcome."""
    return _split(path, (yield from shapley(path.players, seed=path.seed)))


def first_error(path: Path) -> Estimate[Question, Credit]:
    """After a failure, the message that made the first error gets outcome - baseline, and nobody else anything.

    It is the first drop of the values of the prefixes, found by bisection, or what a localizer has found; the baseline is the
    value of the empty path. Without an error the blame is spread evenly. After a success nobody is blamed and nothing asked.
    """
    if path.outcome >= path.settings.threshold:
        return Credit(rewards=(0.0,) * len(path.turns))
    length = len(path.turns)
    if path.localized:
        [baseline] = yield [0]
        return _blamed(path, {0: baseline}, path.fault, gamma=0.0)
    drops = yield from first_error_by_value(length, epsilon=path.settings.epsilon, known={length: path.outcome})
    return _blamed(path, drops.values, fault_by_value(path.turns, drops), gamma=0.0)


def reward_blame(path: Path) -> Estimate[Question, Credit]:
    """Success: Shapley values refined to messages; failure: first error, harmful and repair (our reading of arXiv 2511.10687).

    Rewards, and what of them is unplaced, sum to v(everybody) - v(nobody) after a success, and to outcome - baseline after a
    failure, where the baseline is the value of the empty path.
    """
    if path.outcome < path.settings.threshold:
        known = dict(enumerate((yield from prefix_values(path))))
        drops = yield from first_error_by_value(len(path.turns), epsilon=path.settings.epsilon, known=known)
        fault = path.fault if path.localized else fault_by_value(path.turns, drops)
        return _blamed(path, known, fault, gamma=path.settings.gamma)
    attribution = yield from shapley(path.players, seed=path.seed)
    values = yield from prefix_values(path)
    phi, unplaced = _placed(path, attribution)
    found = message_rewards(
        path.agents, phi=phi, values=values, outcome=path.outcome, baseline=attribution.empty, settings=path.settings
    )
    return Credit(
        rewards=found.rewards, attribution=attribution, unplaced=unplaced, residual=found.residual, values=tuple(values)
    )


CREDIT: Mapping[CreditMethod, Callable[[Path], Estimate[Question, Credit]]] = {
    "local": local,
    "outcome": outcome,
    "loo": loo,
    "shapley": shapley_value,
    "first_error": first_error,
    "process_reward": process_reward,
    "reward_blame": reward_blame,
}


def prefix_values(path: Path) -> Estimate[Question, list[float]]:
    """Values of the prefixes of 0 to M messages; the last one is the outcome, which nobody needs to ask for."""
    asked = yield list(range(len(path.turns)))
    return [*asked, path.outcome]


def _blamed(path: Path, known: Mapping[int, float], fault: Fault | None, *, gamma: float) -> Credit:
    """The blame of a failure; `known` are values of prefixes, of which without a fault only the baseline counts.

    A prefix that was not valued has the value of the longest known one before it: bisection leaves no drop in between.
    """
    length = len(path.turns)
    values = tuple(known[max(number for number in known if number <= prefix)] for prefix in range(length + 1))
    failure = failure_rewards(
        values if fault else values[:1] * (length + 1), baseline=known[0], outcome=path.outcome, beta=path.settings.beta,
        epsilon=path.settings.epsilon, gamma=gamma, first_error=fault.turn if fault else None,
    )  # fmt: skip
    complete = values if len(known) == length + 1 else ()
    return Credit(rewards=failure.rewards, values=complete, failure=failure, fault=fault)


def _split(path: Path, attribution: Attribution) -> Credit:
    phi, unplaced = _placed(path, attribution)
    rewards = success_rewards(path.agents, phi, None, form="weighted")
    return Credit(rewards=tuple(rewards), attribution=attribution, unplaced=unplaced)


def _placed(path: Path, attribution: Attribution) -> tuple[dict[str, float], float]:
    """Credit of the agents that have a message, and the sum of the others'."""
    phi = dict(zip(attribution.players, attribution.phi, strict=True))
    absent = [agent for agent in phi if agent not in path.agents]
    return {agent: value for agent, value in phi.items() if agent in path.agents}, math.fsum(phi[agent] for agent in absent)
