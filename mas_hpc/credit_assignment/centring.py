"""Credit that survives group centring: what centring erases of a credit, and credit as a weight of advantages instead.

An advantage is a reward minus the mean of its group, so whatever is constant inside a group is lost: a bonus of phi to all K
siblings of an agent's turn changes nothing. Credit has to differ among the siblings, or multiply what is left of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import pvariance


@dataclass(frozen=True, slots=True, kw_only=True)
class Centring:
    """What centring within groups leaves of the variance of a credit.

    Example: erased_by_centring([1.0, 1.0, 0.0, 0.5], ["a", "a", "b", "b"]) has total_variance=0.171875,
        within_variance=0.03125, erased_share about 0.818, num_constant_groups=1, num_groups=2
    """

    total_variance: float
    """Of all values, about their mean."""
    within_variance: float
    """Of all values, each about the mean of its group: what an advantage can see."""
    erased_share: float
    """1 - within / total; 1 when all values are equal, since nothing of them is left."""
    num_constant_groups: int
    """Groups whose values are all equal, those of one value included."""
    num_groups: int


def erased_by_centring(values: Sequence[float], keys: Sequence[Hashable]) -> Centring:
    """Split the variance of the values of one credit by group; keys[i] names the group of values[i].

    Population variances, computed exactly: total = within + between, and the part between groups is erased. Needs at least
    one value; all are finite.
    """
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for value, key in zip(values, keys, strict=True):
        groups[key].append(value)
    total = pvariance(values)
    within = fsum(len(group) * pvariance(group) for group in groups.values()) / len(values)
    return Centring(
        total_variance=total,
        within_variance=within,
        erased_share=max(1.0 - within / total, 0.0) if total else 1.0,
        num_constant_groups=sum(len(set(group)) == 1 for group in groups.values()),
        num_groups=len(groups),
    )


def credit_weights(phi: Mapping[str, float], *, limit: float) -> dict[str, float]:
    """Weight of each agent's advantages: |phi| / mean |phi|, kept within [1 / limit, limit]; 1 for all when all phi are 0.

    By size only, so a weight is never negative: a negative one would turn the order of the siblings around, and so train an
    agent with phi < 0 towards its worst turns. What the sign of phi does is in `guarded`. limit is at least 1.
    """
    assert limit >= 1, f"{limit=}"
    total = fsum(abs(credit) for credit in phi.values())
    if not total:
        return dict.fromkeys(phi, 1.0)
    return {agent: min(max(abs(credit) * len(phi) / total, 1.0 / limit), limit) for agent, credit in phi.items()}


def guarded(advantage: float, phi: float, weight: float) -> float:
    """Weigh an advantage by its agent's credit, without ever changing its sign: advantage * weight.

    Where phi < 0 the team does better without the agent, so to be better than its own siblings is no proof of help: a
    positive advantage is not amplified (weight at most 1), a negative one is weighed in full. The price is that the
    advantages of such a group no longer sum to 0: with weights above 1 the agent is pushed away from what it does.
    """
    assert weight >= 0, f"{weight=} would flip the sign of the advantage"
    return advantage * (min(weight, 1.0) if phi < 0 < advantage else weight)
