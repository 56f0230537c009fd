"""Statistics of evaluations: pure functions of counts and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from mas_hpc.types import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Two systems on the same questions.

    Example: paired_test([False, False, True], [True, True, True]) has wins=2, losses=0, p_value=0.5, difference=2/3
    """

    wins: int
    """Questions that only the second system got right."""
    losses: int
    """Questions that only the first system got right."""
    p_value: float
    """Two-sided, exact."""
    difference: float
    """Accuracy of the second minus that of the first."""
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictBalance:
    """How well a judge separates right from wrong; an unreadable verdict is never counted right.

    Example: approving everything gives recall_right=1, recall_wrong=0, balanced_accuracy=0.5
    """

    recall_right: float | None
    """Share of the right answers that were approved; None without right answers."""
    recall_wrong: float | None
    """Share of the wrong answers that were rejected; None without wrong answers."""
    balanced_accuracy: float | None
    """Mean of the two recalls; None when either is."""
    unreadable: int
    """Verdicts that could not be read."""
    n: int
    """Verdicts asked for."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the bound is the share itself, but for rounding.
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def paired_test(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> PairedTest:
    """Exact McNemar test, and the interval of the paired difference (Newcombe 1998, Stat. Med. 17:2635, method 10).

    Item i of both is the same question. Raises ValueError when they differ in length.
    """
    pairs = Counter((bool(first), bool(second)) for first, second in zip(before, after, strict=True))
    both, wins, losses, neither = (pairs[k] for k in ((True, True), (False, True), (True, False), (False, False)))
    low, high = _newcombe(both, wins, losses, neither, confidence)
    discordant = wins + losses
    tail = sum(math.comb(discordant, k) for k in range(min(wins, losses) + 1))
    return PairedTest(
        wins=wins, losses=losses, p_value=min(1.0, 2 * tail / 2**discordant),
        difference=(wins - losses) / len(before) if before else 0.0, low=low, high=high,
    )  # fmt: skip


def _newcombe(both: int, wins: int, losses: int, neither: int, confidence: float) -> tuple[float, float]:
    """Square-and-add of two Wilson intervals, corrected by the continuity-corrected correlation of the pairs."""
    n = both + wins + losses + neither
    if n == 0:
        return -1.0, 1.0
    after, before = both + wins, both + losses
    (low_1, high_1), (low_2, high_2) = wilson(after, n, confidence), wilson(before, n, confidence)
    p_1, p_2 = after / n, before / n
    margins = after * (n - after) * before * (n - before)
    covariance = both * neither - wins * losses
    corrected = max(covariance - n / 2, 0.0) if covariance > 0 else covariance
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * phi * a * b + b * b)

    return p_1 - p_2 - half(p_1 - low_1, high_2 - p_2), p_1 - p_2 + half(high_1 - p_1, p_2 - low_2)


def balanced_verdicts(pairs: Iterable[tuple[bool | None, bool]]) -> VerdictBalance:
    """Balance of (verdict, truth) pairs; verdict None is unreadable."""
    counts = Counter(pairs)

    def recall(truth: bool) -> float | None:
        total = sum(number for (_, actual), number in counts.items() if actual is truth)
        return counts[truth, truth] / total if total else None

    right, wrong = recall(True), recall(False)
    return VerdictBalance(
        recall_right=right, recall_wrong=wrong,
        balanced_accuracy=None if right is None or wrong is None else (right + wrong) / 2,
        unreadable=counts[None, True] + counts[None, False], n=counts.total(),
    )  # fmt: skip


def tokens_per_question(traces: Sequence[Trace]) -> float:
    """Mean of the tokens sampled to answer a question: all its turns, but those that only value another turn."""
    return fmean(
        sum(len(turn.completion_ids) for turn in trace.turns if not turn.counterfactual) for trace in traces
    )  # fmt: skip


def majority(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer, the first seen among equals; None (no answer) never wins over an answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)
