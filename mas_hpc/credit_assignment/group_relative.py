"""Advantages relative to a group: every GRPO relative is this function, the paper is the key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev
from typing import Literal

EPSILON = 1e-4  # TRL's: golden values +1.207381 / -0.724429 for rewards 1,1,1,0,0,0,0,0


def group_relative(rewards: Sequence[float], keys: Sequence[Hashable], *, normalize: Literal["std", "mean"]) -> list[float]:
    """Reward minus group mean, over (sample standard deviation + 1e-4) when normalize is "std".

    GRPO (arXiv 2402.03300) groups by task, AT-GRPO (arXiv 2510.11062) by (task, agent, turn); "mean" is Dr. GRPO
    (arXiv 2503.20783). A group without variance gets exactly 0. Raises ValueError for a group of one.
    """
    members: dict[Hashable, list[float]] = defaultdict(list)
    for reward, key in zip(rewards, keys, strict=True):
        members[key].append(reward)
    for key, group in members.items():
        if len(group) < 2:
            raise ValueError(f"group {key}: a group baseline needs at least 2 members, found {len(group)}")
    mean = {key: fmean(group) for key, group in members.items()}
    scale = {key: stdev(group) + EPSILON if normalize == "std" else 1.0 for key, group in members.items()}
    flat = {key for key, group in members.items() if min(group) == max(group)}
    return [0.0 if key in flat else (reward - mean[key]) / scale[key] for reward, key in zip(rewards, keys, strict=True)]
