"""How well credit finds a planted truth, and the trivial credit that a method must beat."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from mas_hpc.types import Turn

DEAD_ZONE = 0.017
"""Credit nearer to zero than this has no sign: analytic values of the scripted teams are below 0.002 or above twice this."""
TIE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a method says of one trace.

    Example: Found(messages=(0.5, -0.5), agents={"solver": 0.5, "critic": -0.5})
    """

    messages: tuple[float, ...]
    agents: Mapping[str, float]
    """By name, agents without a message included."""


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    rounded = np.round(np.asarray(values, dtype=float), 9)
    below = (rounded[:, None] > rounded[None, :]).sum(axis=1)
    equal = (rounded[:, None] == rounded[None, :]).sum(axis=1)
    return below + (equal - 1) / 2


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation with ties: Pearson's of the ranks; 0 where one side is constant, since it orders nothing."""
    a, b = ranks(left), ranks(right)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else 0.0


def sign(value: float, dead_zone: float = DEAD_ZONE) -> int:
    """-1, 0 or 1."""
    return 0 if abs(value) < dead_zone else 1 if value > 0 else -1


def sign_accuracy(credit: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Share of the agents whose credit has the sign of the truth, zero being a sign of its own."""
    return fmean(sign(credit[agent]) == sign(truth[agent]) for agent in truth)


def rank_correlation(credit: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Spearman's, over the agents."""
    agents = list(truth)
    return spearman([credit[agent] for agent in agents], [truth[agent] for agent in agents])


def naming(values: Sequence[float], culprit: int) -> float:
    """Probability that the lowest value is the culprit's when ties are broken at random."""
    lowest = [number for number, value in enumerate(values) if value <= min(values) + TIE]
    return 1.0 / len(lowest) if culprit in lowest else 0.0


def names_agent(found: Found, culprit: str, speakers: Collection[str]) -> float:
    """Probability that, of the agents that spoke, the one of least credit is the culprit."""
    agents = [agent for agent in found.agents if agent in speakers]
    return naming([found.agents[agent] for agent in agents], agents.index(culprit))


def mean_credit(found: Iterable[Found]) -> dict[str, float]:
    """Of every agent, over traces."""
    entries = [entry.agents for entry in found]
    return {agent: fmean(entry[agent] for entry in entries) for agent in entries[0]}


def gathered(path: Sequence[Turn], players: Sequence[str], rewards: Sequence[float], *, mean: bool) -> dict[str, float]:
    """Agents' sums of their messages' rewards, or means where rewards are scores and no parts of a whole."""
    own = {player: [reward for turn, reward in zip(path, rewards, strict=True) if turn.agent == player] for player in players}
    return {player: (fmean(parts) if mean else math.fsum(parts)) if parts else 0.0 for player, parts in own.items()}


# ---- trivial credit: reads no text and asks no value

TRIVIAL = ("everybody alike", "most talkative blamed", "most talkative praised", "first speaker blamed")
"""The first is chance where somebody is to be named, since ties decide, and praise for all where a sign is asked for. Beside
these there is `constant step k blamed`."""
NUM_STEPS = 6


def trivial(name: str, path: Sequence[Turn], players: Sequence[str]) -> Found:
    """The credit that a trivial rule gives to a path."""
    lengths = [float(len(turn.completion_ids)) for turn in path]
    if name == "everybody alike":
        rewards = [1.0] * len(path)
    elif name.startswith("most talkative"):
        rewards = [length / sum(lengths) * (-1.0 if name.endswith("blamed") else 1.0) for length in lengths]
    else:
        step = 0 if name == "first speaker blamed" else int(name.split()[2])
        rewards = [-1.0 if number == step else 0.0 for number in range(len(path))]
    return Found(messages=tuple(rewards), agents=gathered(path, players, rewards, mean=name == "everybody alike"))


def trivial_names() -> tuple[str, ...]:
    """Every rule; the first step is the first speaker's."""
    return (*TRIVIAL, *(f"constant step {step} blamed" for step in range(1, NUM_STEPS)))
