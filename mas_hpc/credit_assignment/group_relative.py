"""Advantages relative to a baseline: of the group (every GRPO relative; the paper is the key), the agent or the batch.

N values (tokens of policies, all trajectories concatenated).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from math import isnan
from statistics import fmean, stdev
from typing import Literal, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

Key = TypeVar("Key", bound=Hashable)
GroupAdvantage = Literal["group", "group_mean", "group_batch", "rloo"]
SCALES: Mapping[GroupAdvantage, tuple[Literal["mean", "leave_one_out"], Literal["group", "batch", "none"]]] = {
    "group": ("mean", "group"),
    "group_mean": ("mean", "none"),
    "group_batch": ("mean", "batch"),
    "rloo": ("leave_one_out", "none"),
}
"""(baseline, scale) by name: GRPO, Dr. GRPO, REINFORCE++-baseline, RLOO."""

EPSILON = 1e-4  # TRL's: golden values +1.207381 / -0.724429 for rewards 1,1,1,0,0,0,0,0


def group_relative(
    rewards: Sequence[float | None],
    keys: Sequence[Hashable],
    *,
    baseline: Literal["mean", "leave_one_out"],
    scale: Literal["group", "batch", "none"],
) -> list[float]:
    """Reward minus the baseline of its group, over (sample standard deviation + 1e-4) unless scale is "none".

    The baseline is the mean of the group or of its other members. "group" divides by the deviation of the group's rewards,
    "batch" by that of the centred rewards of all groups (TRL's "batch" takes the rewards before centring).

    mean, group: GRPO (arXiv 2402.03300), and AT-GRPO (2510.11062) with (task, agent, turn) as the key. mean, none: Dr. GRPO
    (2503.20783). leave_one_out, none: RLOO (2402.14740). mean, batch: REINFORCE++-baseline (2501.03262).

    A missing reward (None or NaN) counts nowhere and gets 0, and so does the only reward left of a group. A group without
    variance gets exactly 0. Raises ValueError for a group of one.
    """
    for key, size in Counter(keys).items():
        if size < 2:
            raise ValueError(f"group {key}: a group baseline needs at least 2 members, found {size}")
    groups: dict[Hashable, list[float]] = {key: [] for key in keys}
    for reward, key in zip(rewards, keys, strict=True):
        if _present(reward):
            groups[key].append(reward)
    useful = informative(groups)
    mean = {key: fmean(groups[key]) for key in useful}
    divisor = {key: stdev(groups[key]) + EPSILON if scale == "group" else 1.0 for key in useful}
    if baseline == "leave_one_out":  # r_i - mean(others) = (r_i - mean) / ((n - 1) / n)
        divisor = {key: value * (1.0 - 1.0 / len(groups[key])) for key, value in divisor.items()}
    advantages = [
        (reward - mean[key]) / divisor[key] if _present(reward) and key in useful else 0.0
        for reward, key in zip(rewards, keys, strict=True)
    ]
    if scale != "batch" or not useful:
        return advantages
    counted = zip(advantages, rewards, keys, strict=True)
    deviation = stdev(advantage for advantage, reward, key in counted if _present(reward) and len(groups[key]) > 1)
    return [advantage / (deviation + EPSILON) for advantage in advantages]


def informative(rewards_by_key: Mapping[Key, Sequence[float | None]]) -> set[Key]:
    """Keys of the groups whose present rewards differ: what dynamic sampling keeps (DAPO, arXiv 2503.14476, eq. 11)."""
    present = {key: {reward for reward in rewards if _present(reward)} for key, rewards in rewards_by_key.items()}
    return {key for key, rewards in present.items() if len(rewards) > 1}


def rae(
    rewards: Sequence[float | None], agents: Sequence[str], baselines: Mapping[str, float], *, decay: float
) -> tuple[list[float], dict[str, float]]:
    """Role-conditioned advantages (SPIRAL, arXiv 2506.24119) and the new baselines: reward minus the agent's moving average.

    Rewards are taken in order, each against the baseline before it moves it: b <- decay * b + (1 - decay) * reward. (The
    paper's algorithm moves b first, which shrinks the advantage by the factor decay; prime-rl does it as here.) An agent
    that is not in `baselines` starts at 0. A missing reward gets 0 and moves nothing.
    """
    moved = dict(baselines)
    advantages = []
    for reward, agent in zip(rewards, agents, strict=True):
        before = moved.setdefault(agent, 0.0)
        advantages.append(reward - before if _present(reward) else 0.0)
        moved[agent] = decay * before + (1.0 - decay) * reward if _present(reward) else before
    return advantages, moved


def whiten(value_N: NDArray[np.float64], *, shift_mean: bool = True) -> NDArray[np.float64]:
    """Values scaled to mean 0 and deviation 1: (x - mean) / sqrt(var + 1e-8), var with ddof 1, float64.

    Give the valid values of the whole batch, of every rank: the statistics are of what is given. With shift_mean False the
    mean is added back (TRL's reward whitening). Fewer than two values have no deviation and are only shifted.
    """
    if not value_N.size:
        return np.zeros(0)
    mean = value_N.mean(dtype=np.float64)
    centred_N = value_N - mean
    variance = (centred_N**2).sum() / (value_N.size - 1) if value_N.size > 1 else 1.0
    return centred_N / np.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)


def _present(reward: float | None) -> TypeGuard[float]:
    return reward is not None and not isnan(reward)
