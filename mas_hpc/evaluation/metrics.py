"""Statistics of evaluations: pure functions of counts and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, fmean, stdev

import mpmath

from mas_hpc.errors import DataError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteredMean:
    """A mean of values that depend on each other inside a cluster, such as the samples of one question.

    Example: clustered_mean([[1.0, 0.0], [1.0, 1.0]]) has mean=0.75, standard_error=0.25, n=4, num_clusters=2
    """

    mean: float
    standard_error: float | None
    """None with fewer than two clusters."""
    n: int
    num_clusters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedMean:
    """Mean over seeds with the half width of its Student-t interval.

    Example: t_interval([0.5, 0.7]) has mean=0.6, half_width=1.2706, n=2: two seeds say next to nothing
    """

    mean: float
    half_width: float | None
    """None with fewer than two seeds."""
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedSeeds:
    """Mean difference of two methods over seeds that they share, and the paired t-test of no difference.

    Example: paired_t([0.01, 0.03]) has mean=0.02, half_width=0.12706, p_value=0.2952, n=2
    """

    mean: float
    half_width: float | None
    """None with fewer than two seeds."""
    p_value: float | None
    """Two-sided; None where t is undefined: fewer than two seeds, or all differences equal."""
    n: int


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


def tokens_per_correct(traces: Sequence[Trace]) -> float | None:
    """Tokens as in `tokens_per_question`, of all traces, over the number of right ones; None when none is right."""
    num_right = sum(trace.reward == 1.0 for trace in traces)
    return tokens_per_question(traces) * len(traces) / num_right if num_right else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, when c of n are: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1, for one question. Raises DataError when k is not in 1..n.
    """
    _check_samples("pass", n, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def avg_at_k(right: Sequence[Sequence[bool]]) -> ClusteredMean:
    """Mean accuracy over k samples a question, its standard error clustered by question.

    `right[question][sample]`; a sample that failed is False. Raises DataError when the questions have unequal numbers.
    """
    for question, samples in enumerate(right):
        if len(samples) != len(right[0]) or not samples:
            raise DataError(
                f"avg@k: question {question} has {len(samples)} samples, the first has {len(right[0])}; expected equal numbers "
                "of at least 1, with False for a sample that failed"
            )
    return clustered_mean(right)


def clustered_mean(clusters: Sequence[Sequence[float]]) -> ClusteredMean:
    """Mean of all values, with the standard error sqrt(G / (G - 1) * sum over G clusters of (sum of deviations)^2) / n.

    Clustered errors: Miller 2024 (arXiv 2411.00640), section 2.2; G / (G - 1) is the usual correction for few clusters. For
    clusters of one size it is stdev(cluster means) / sqrt(G). Raises ValueError without values.
    """
    values = [value for cluster in clusters for value in cluster]
    mean, num_clusters = fmean(values), sum(len(cluster) > 0 for cluster in clusters)
    squares = sum(sum(value - mean for value in cluster) ** 2 for cluster in clusters)
    error = math.sqrt(num_clusters / (num_clusters - 1) * squares) / len(values) if num_clusters > 1 else None
    return ClusteredMean(mean=mean, standard_error=error, n=len(values), num_clusters=num_clusters)


def noise_k(accuracies: Sequence[float], num_questions: int, target: float = 0.015) -> int:
    """Smallest k for which avg@k has sampling noise sqrt(mean p(1 - p) / (N k)) below `target`.

    The evaluation protocol of C3 (arXiv 2603.06859). `accuracies` are the p of questions, of a pilot or of the set, or one p
    for all, which overstates the noise; p of m samples understates it, by the factor sqrt(1 - 1/m). N is `num_questions`.
    """
    assert target > 0, target
    variance = fmean(accuracy * (1 - accuracy) for accuracy in accuracies)
    k = max(1, math.floor(variance / (num_questions * target**2)))
    while math.sqrt(variance / (num_questions * k)) >= target:
        k += 1
    return k


def maj_at_k(answers: Sequence[str | None], grade: Callable[[str], bool], k: int) -> float:
    """Exact expected accuracy of `majority` over k of the n answers to one question, drawn without replacement.

    All orders of arrival are equally likely, so answers that tie for the first place win equally often. None (no answer) is
    drawn but never wins; a draw of None alone is wrong. `grade` is asked once a distinct answer. Nothing is sampled: draws are
    counted by the votes of the winner, in polynomial time. Raises DataError when k is not in 1..n.
    """
    _check_samples("maj", len(answers), k)
    counts = Counter(answer for answer in answers if answer is not None)
    right = {answer: grade(answer) for answer in counts}
    num_none = len(answers) - counts.total()
    won = Fraction(0)
    for top in range(1, min(k, max(counts.values(), default=0)) + 1):
        for (votes, tied_right, tied), ways in _draws(counts, right, top, k).items():
            if tied:
                won += Fraction(tied_right, tied) * ways * math.comb(num_none, k - votes)
    return float(won / math.comb(len(answers), k))


def _draws(counts: Mapping[str, int], right: Mapping[str, bool], top: int, k: int) -> Counter[tuple[int, int, int]]:
    """Ways to draw at most k answers, none over `top` times, by (number drawn, right answers drawn `top` times, all such)."""
    ways = Counter({(0, 0, 0): 1})
    for answer, count in counts.items():
        extended: Counter[tuple[int, int, int]] = Counter()
        for (drawn, tied_right, tied), number in ways.items():
            for votes in range(min(count, top, k - drawn) + 1):
                ties = votes == top
                state = (drawn + votes, tied_right + (ties and right[answer]), tied + ties)
                extended[state] += number * math.comb(count, votes)
        ways = extended
    return ways


def _check_samples(metric: str, n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise DataError(f"{metric}@{k}: expected k from 1 to the samples of a question, {n}; take another k or sample more")


def t_interval(values: Sequence[float], confidence: float = 0.95) -> SeedMean:
    """Mean of independent runs (seeds) and the half width of its Student-t interval. Raises ValueError without values."""
    n = len(values)
    half = t_quantile(n - 1, confidence) * stdev(values) / math.sqrt(n) if n > 1 else None
    return SeedMean(mean=fmean(values), half_width=half, n=n)


def paired_t(differences: Sequence[float], confidence: float = 0.95) -> PairedSeeds:
    """Paired t-test: is the mean of the differences, one a seed, 0? Raises ValueError without values."""
    interval = t_interval(differences, confidence)
    error = stdev(differences) / math.sqrt(interval.n) if interval.n > 1 else 0.0
    return PairedSeeds(
        mean=interval.mean, half_width=interval.half_width, n=interval.n,
        p_value=_t_outside(interval.mean / error, interval.n - 1) if error else None,
    )  # fmt: skip


def _t_outside(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's t: I_x(df/2, 1/2) at x = df / (df + t^2) (Abramowitz and Stegun, 26.5.27)."""
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(|T| <= t) = confidence, of Student's t with so many degrees of freedom, at least 1."""
    # The x of `_t_outside` by bracketing, then t.
    outside = 1.0 - confidence
    x = mpmath.findroot(lambda x: mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - outside, (0, 1), solver="bisect")
    return float(mpmath.sqrt(degrees * (1 - x) / x))
