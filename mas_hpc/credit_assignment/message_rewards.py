"""From the credit of agents to training signals of messages: our reading of arXiv 2511.10687, whose equations we do not have.

Its abstract asks for rewards that are local, signed, credit-conserving and bounded: on success Shapley credit refined to
messages, on failure the first error blamed and later repairs spared. The formulas here are ours and claim no more than that.

M messages in the order in which they were written, counted from 0. `values` are M + 1 numbers: V of the prefixes of 0 to M
messages, the probability that the team succeeds from there. The progress of message m is values[m + 1] - values[m].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, isfinite, nan
from typing import Literal

from mas_hpc.errors import DataError

Form = Literal["weighted", "signed"]

TOLERANCE = 1e-9  # of phi: a solver's rounding is no credit


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRewards:
    """Who is blamed for a failed episode.

    Example: failure_rewards([0.5, 0.5, 0.1, 0.4], baseline=0.5, outcome=0.0, epsilon=0.1, beta=1.0, gamma=0.5) has
        rewards about (0.0, -0.65, 0.15), first_error=1, repairs=(2,), harmful=(), residual=0.0
    """

    rewards: tuple[float, ...]
    """One a message."""
    first_error: int | None
    """The message that made it; None when no message was found at fault."""
    repairs: tuple[int, ...]
    """Messages after it that raised the value by more than epsilon."""
    harmful: tuple[int, ...]
    """Messages after it that lowered the value by more than epsilon."""
    residual: float
    """What the rewards leave unpaid of outcome - baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRewardSettings:
    """How outcomes become rewards of messages.

    Example: MessageRewardSettings(form="signed", spread=0.25)
    """

    threshold: float = 0.5
    """Outcome from which an episode is a success."""
    form: Form = "weighted"
    """How an agent's credit is split among its messages on success."""
    spread: float = 0.5
    """Reward of one unit of progress above the agent's mean, in the signed form."""
    epsilon: float = 0.1
    """Change of the value that is taken as an effect and not as noise; above 0. Of values that are means of n continuations,
    choose it between multiples of 1 / n: at a multiple, rounding decides."""
    beta: float = 1.0
    """Blame of the first error, before normalising; above 0."""
    gamma: float = 0.5
    """Blame or praise of one unit of progress after it, before normalising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRewards:
    """The rewards of an episode's messages, and what they leave unpaid.

    Example: MessageRewards(rewards=(0.25, 0.5), residual=0.25, failure=None).succeeded is True
    """

    rewards: tuple[float, ...]
    """One a message."""
    residual: float
    """outcome - baseline - sum(rewards). On success it is the part of the outcome that phi does not explain: 0 when v(N) is
    this outcome, else the luck of this episode against the mean of its replays."""
    failure: FailureRewards | None
    """Who was blamed; None after a success."""

    @property
    def succeeded(self) -> bool:
        """Whether the episode was rewarded as a success."""
        return self.failure is None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two turns sampled from one prefix, by turn id.

    Example: PreferencePair(prefix_turn="q0/0.1", chosen="q0/1.2", rejected="q0/1.0", margin=0.5)
    """

    prefix_turn: str | None
    """The turn that both continue; None when they open the episode."""
    chosen: str
    rejected: str
    margin: float
    """Value after the chosen turn minus value after the rejected one; above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLabels:
    """Labels of an episode's messages for a process reward model, 0 to 1.

    Example: step_labels([0.5, 0.6, 0.2, 0.4], epsilon=0.1) has soft=(0.6, 0.2, 0.4), hard=(1.0, 0.0, nan)
    """

    soft: tuple[float, ...]
    """One a message: the value of the prefix that ends with it."""
    hard: tuple[float, ...]
    """One a message: 1 before the first error, 0 at it, nan (not known) after it."""


def default_epsilon(num_replays: int) -> float:
    """A change that is not noise of values that are means of so many replays, between two multiples of 1 / num_replays."""
    return 0.5 if num_replays == 1 else max(0.15, 1.5 / num_replays)


def message_rewards(
    agents: Sequence[str],
    *,
    phi: Mapping[str, float],
    values: Sequence[float] | None,
    outcome: float,
    baseline: float,
    settings: MessageRewardSettings,
    first_error: int | None = None,
) -> MessageRewards:
    """Reward every message of one episode: as a success when outcome >= settings.threshold, else as a failure.

    `agents[m]` wrote message m, `phi` is the credit of each agent, `baseline` is v(empty); outcome and baseline are in [0, 1].
    On failure phi has no say. Without values nothing is known of progress: the message that a localizer found takes the
    blame, and without one all messages share it. Raises DataError as `success_rewards` and `failure_rewards` do.
    """
    if outcome >= settings.threshold:
        rewards = success_rewards(agents, phi, values, form=settings.form, spread=settings.spread)
        return MessageRewards(rewards=tuple(rewards), residual=outcome - baseline - fsum(rewards), failure=None)
    known = [baseline] * (len(agents) + 1) if values is None else values
    assert len(known) == len(agents) + 1, f"{len(agents)} messages have {len(agents) + 1} prefixes, not {len(known)}"
    failure = failure_rewards(
        known, baseline=baseline, outcome=outcome, epsilon=settings.epsilon, beta=settings.beta, gamma=settings.gamma,
        first_error=first_error,
    )  # fmt: skip
    return MessageRewards(rewards=failure.rewards, residual=failure.residual, failure=failure)


def success_rewards(
    agents: Sequence[str], phi: Mapping[str, float], values: Sequence[float] | None, *, form: Form, spread: float = 0.5
) -> list[float]:
    """Split each agent's credit phi among its messages; returns one reward a message.

    weighted: phi * w, where w >= 0 sums to 1 within the agent and goes by the progress of its messages in the direction of
    phi: rises where phi >= 0, drops where phi < 0, so that a saboteur's blame falls on the messages that did the harm;
    uniform where there is none. All rewards of an agent have the sign of phi, and a null agent's are 0.
    signed: phi / (its number of messages) + spread * (progress - mean progress of the agent). The second term sums to 0, and
    where it would lead beyond the bound it is shrunk by one factor for the agent, so that the sum stays exact and the order
    of its messages is kept. Here sign and null hold of the agent's total only.

    Without values all progress is taken as equal. An agent's rewards sum to its phi, so all of them sum to
    v(N) - v(empty) where phi is efficient, and |reward| <= max(1, |phi|), which is 1 for v in [0, 1]. Raises DataError when
    a message's author has no phi, an agent with phi other than 0 has no message, or a value is not finite.
    """
    messages = _messages_by_agent(agents, phi)
    progress = [0.0] * len(agents) if values is None else _progress(values)
    assert len(progress) == len(agents), f"{len(agents)} messages have {len(agents) + 1} prefixes, not {len(progress) + 1}"
    rewards = [0.0] * len(agents)
    for agent, numbers in messages.items():
        own = [progress[number] for number in numbers]
        parts = _weighted(phi[agent], own) if form == "weighted" else _signed(phi[agent], own, spread)
        for number, part in zip(numbers, parts, strict=True):
            rewards[number] = part
    return rewards


def failure_rewards(
    values: Sequence[float],
    *,
    baseline: float,
    outcome: float,
    epsilon: float,
    beta: float,
    gamma: float,
    first_error: int | None = None,
) -> FailureRewards:
    """Blame the first error and harmful messages after it, and credit repairs, so that the sum is outcome - baseline.

    The first error is the given one or the first drop (`first_drop`). It gets -beta; after it a message whose progress is
    above epsilon (a repair) or below -epsilon (harmful) gets gamma * progress; all others get 0. Then they are normalised:
    repairs keep their size (all shrunk alike if one is above 1) and all faults are scaled by one factor to pay for the rest
    of the total; if that would take a fault below -1 the faults stop there and the repairs are shrunk instead. So beta
    against gamma sets how faults share the blame, not how much there is. Bounds (|reward| <= 1) and signs (faults <= 0 <=
    repairs) win over the sizes of repairs, and over the total in one case, which leaves it as `residual`: an outcome above
    the baseline and no repair to reward. At outcome == baseline the faults pay for the repairs, and without repairs all is 0.

    Without a first error nobody in particular is known to be at fault: every message gets the same share of the total.
    Outcome and baseline are in [0, 1]. Raises DataError when a value is not finite.
    """
    assert 0 <= outcome <= 1 and 0 <= baseline <= 1 and beta > 0, f"{outcome=}, {baseline=}, {beta=}"
    assert len(values) > 1, "no message to blame"
    total, progress = outcome - baseline, _progress(values)
    culprit = first_drop(values, epsilon=epsilon) if first_error is None else first_error
    if culprit is None:
        share = (total / len(progress),) * len(progress)
        return FailureRewards(rewards=share, first_error=None, repairs=(), harmful=(), residual=0.0)
    assert 0 <= culprit < len(progress), f"first error {culprit} of {len(progress)} messages"
    return _faulted(progress, culprit, total, epsilon=epsilon, beta=beta, gamma=gamma)


def first_drop(values: Sequence[float], *, epsilon: float) -> int | None:
    """The first message m with values[m + 1] <= values[m] - epsilon; None when there is none. epsilon is above 0."""
    assert epsilon > 0, f"{epsilon=} makes an error of a message without effect"
    drops = (number for number, (before, after) in enumerate(pairwise(values)) if after <= before - epsilon)
    return next(drops, None)


def preference_margins(siblings: Sequence[tuple[str, float]], erroneous: str) -> dict[str, float]:
    """Value of every other sibling minus the value of the erroneous one, by turn id.

    Siblings are (turn id, value of the prefix that ends with it), sampled at one prefix; the erroneous turn is one of them.
    """
    value = dict(siblings)
    assert len(value) == len(siblings) and erroneous in value, f"{erroneous} is not one of {len(siblings)} distinct siblings"
    return {turn: value[turn] - value[erroneous] for turn in value if turn != erroneous}


def repair_pairs(
    siblings: Sequence[tuple[str, float]], erroneous: str, *, prefix_turn: str | None, min_margin: float
) -> tuple[PreferencePair, ...]:
    """Prefer every re-sampled turn that repairs the erroneous one: its value is higher by min_margin or more, and above 0.

    Arguments as in `preference_margins`; all siblings continue `prefix_turn`. Pairs are in the order of the siblings. A
    sibling whose value is nan (it could not be valued) makes no pair.
    """
    return tuple(
        PreferencePair(prefix_turn=prefix_turn, chosen=turn, rejected=erroneous, margin=margin)
        for turn, margin in preference_margins(siblings, erroneous).items()
        if margin >= min_margin and margin > 0
    )


def step_labels(values: Sequence[float], *, epsilon: float, first_error: int | None = None) -> StepLabels:
    """Label every message for a process reward model, softly by value and hard by the first error.

    Soft: the share of continuations that succeed, as in Math-Shepherd's soft estimation (arXiv 2312.08935). Hard: as the
    labels of ProcessBench are read (data.steps), all 1 without an error. The first error is the given one or the first drop.
    Raises DataError when a value is not finite.
    """
    progress = _progress(values)
    culprit = first_drop(values, epsilon=epsilon) if first_error is None else first_error
    right = len(progress) if culprit is None else culprit
    hard = [1.0 if number < right else 0.0 if number == right else nan for number in range(len(progress))]
    return StepLabels(soft=tuple(values[1:]), hard=tuple(hard))


def _progress(values: Sequence[float]) -> list[float]:
    for length, value in enumerate(values):
        if not isfinite(value):
            raise DataError(
                f"value of the prefix of {length} messages: {value}; expected a finite number: "
                "decide what failed continuations are worth, or value the prefix again"
            )
    return [after - before for before, after in pairwise(values)]


def _messages_by_agent(agents: Sequence[str], phi: Mapping[str, float]) -> Mapping[str, list[int]]:
    messages: dict[str, list[int]] = defaultdict(list)
    for number, agent in enumerate(agents):
        messages[agent].append(number)
    for agent in messages:
        if agent not in phi:
            raise DataError(
                f"agent {agent!r} wrote message {messages[agent][0]} but has no credit; expected one of {sorted(phi)}: "
                "attribute the episode to the team that played it"
            )
    for agent, credit in phi.items():
        if agent not in messages and abs(credit) > TOLERANCE:
            raise DataError(
                f"agent {agent!r}: a role without outputs cannot carry its credit of {credit:.3g}; expected a message or a "
                "credit of 0: attribute this very episode, or leave the agent out of the players"
            )
    return messages


def _weighted(phi: float, progress: Sequence[float]) -> list[float]:
    towards = [max(change if phi >= 0 else -change, 0.0) for change in progress]
    return _split(phi, towards if any(towards) else [1.0] * len(towards))


def _signed(phi: float, progress: Sequence[float], spread: float) -> list[float]:
    base, mean, bound = phi / len(progress), fsum(progress) / len(progress), max(1.0, abs(phi))
    offsets = [spread * (change - mean) for change in progress]
    room = [(bound - base if offset > 0 else bound + base) / abs(offset) for offset in offsets if offset]
    shrink = min([1.0, *room])
    return [base + shrink * offset for offset in offsets]


def _faulted(
    progress: Sequence[float], culprit: int, total: float, *, epsilon: float, beta: float, gamma: float
) -> FailureRewards:
    after = range(culprit + 1, len(progress))
    repairs = tuple(number for number in after if progress[number] > epsilon)
    harmful = tuple(number for number in after if progress[number] < -epsilon)
    praise = [gamma * progress[number] if number in repairs else 0.0 for number in range(len(progress))]
    blame = [-gamma * progress[number] if number in harmful else 0.0 for number in range(len(progress))]
    blame[culprit] = beta
    praised, blamed = _budgets(praise, blame, total)
    return FailureRewards(
        rewards=tuple(up - down for up, down in zip(_split(praised, praise), _split(blamed, blame), strict=True)),
        first_error=culprit, repairs=repairs, harmful=harmful, residual=max(total, 0.0) if not any(praise) else 0.0,
    )  # fmt: skip


def _budgets(praise: Sequence[float], blame: Sequence[float], total: float) -> tuple[float, float]:
    """What repairs and faults get in sum, the second to be subtracted: their difference is the total, no message above 1.

    For |total| <= 1 they exist if there is praise or total <= 0: the largest blame alone can pay 1, and so can the praise.
    """
    wanted, ceiling = fsum(praise) / max(1.0, *praise), fsum(blame) / max(blame)
    blamed = min(max(wanted - total, 0.0), ceiling)
    return (max(total + blamed, 0.0) if any(praise) else 0.0), blamed


def _split(amount: float, parts: Sequence[float]) -> list[float]:
    """The amount in proportion to the parts, which are not negative; nothing to anybody where all are 0."""
    whole = fsum(parts)
    return [amount * (part / whole) if whole else 0.0 for part in parts]
