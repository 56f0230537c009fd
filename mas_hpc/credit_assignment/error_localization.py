"""Who made the first error, where and with what evidence: by the value of prefixes, by step scores, by executed arithmetic.

A judge that is a language model is in `llm_judge`. T messages of the committed path, counted from 0; the prefix of length t
holds messages 0 to t - 1, so message t leads from the prefix of length t to that of length t + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isfinite

from mas_hpc.credit_assignment.arithmetic import check, first_wrong_step
from mas_hpc.credit_assignment.estimate import Estimate
from mas_hpc.errors import DataError
from mas_hpc.types import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The first error of a path.

    Example: Fault(agent="solver", turn=0, step=2, method="arithmetic", evidence="12 * 3 = 35: the left side is 36, not 35")
    """

    agent: str
    turn: int
    """Index on the committed path."""
    step: int | None
    """Index of the step within the turn's text (`split_steps`), from 0; None when the method judges whole turns."""
    method: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drops:
    """What the values of prefixes say about messages.

    Example: of the values 1, 1, 0, 1, 0 under epsilon 0.5: first_error=1, repairs=(2,), harmful=(3,), monotone=False
    """

    first_error: int | None
    """The first message that is an error; None when there is none."""
    repairs: tuple[int, ...]
    """Messages after it that raise the value by more than epsilon: attempts to repair it, which are spared."""
    harmful: tuple[int, ...]
    """Messages after it that lower the value by more than epsilon."""
    monotone: bool
    """Whether the values that were asked first never rose by more than epsilon. If False, all were asked."""
    values: Mapping[int, float]
    """Every known value by length of the prefix."""
    asked: int
    """Prefixes whose value was asked for."""


def first_error_by_value(
    num_messages: int, *, epsilon: float, threshold: float = 0.0, known: Mapping[int, float] | None = None
) -> Estimate[int, Drops]:
    """Find the first message t with V(t + 1) <= V(t) - epsilon, or with V(t + 1) < threshold <= V(t), by bisection.

    A question is the length t of a prefix, 0 to `num_messages`; its value V(t) is the probability that the team succeeds
    from there, as from m continuations (OmegaPRM, arXiv 2406.06592, searches the first t with V(t) = 0). `known` has values
    that need not be asked, such as the outcome at t = T. Choose epsilon above the noise of m continuations.

    Only gaps across which the value falls are halved, so that one drop in T messages costs O(log T) values, asked in
    batches; then the middle of every gap that is left is asked as a check. Where values never rise the result is exact. A
    value more than epsilon above an earlier one shows a repair, which can hide an error before it: then all prefixes are
    asked and scanned. A repair that no asked prefix falls on goes unseen. Raises DataError when a value is not finite.
    """
    assert num_messages > 0 and epsilon > 0, f"{num_messages=}, {epsilon=}"
    values = dict(known or {})
    asked = 0

    def learn(lengths: Sequence[int]) -> Estimate[int, None]:
        nonlocal asked
        new = [length for length in lengths if length not in values]
        if new:
            asked += len(new)
            values.update(zip(new, (yield new), strict=True))
        _check_finite(values)

    yield from learn([0, num_messages])
    while middles := [(a + b) // 2 for a, b in _gaps(values) if _is_error(values[a], values[b], epsilon, threshold)]:
        yield from learn(middles)
    yield from learn([(a + b) // 2 for a, b in _gaps(values)])
    monotone = _never_rises([values[length] for length in sorted(values)], epsilon)
    if not monotone:
        yield from learn(range(num_messages + 1))
    return _drops(values, epsilon=epsilon, threshold=threshold, monotone=monotone, asked=asked)


def _gaps(values: Mapping[int, float]) -> Iterator[tuple[int, int]]:
    """Neighbouring known lengths with unknown ones between them."""
    return ((a, b) for a, b in pairwise(sorted(values)) if b - a > 1)


def _is_error(before: float, after: float, epsilon: float, threshold: float) -> bool:
    return after <= before - epsilon or after < threshold <= before


def _never_rises(values: Sequence[float], epsilon: float) -> bool:
    return all(value <= lowest + epsilon for value, lowest in zip(values, accumulate(values, min), strict=True))


def _check_finite(values: Mapping[int, float]) -> None:
    for length, value in values.items():
        if not isfinite(value):
            raise DataError(
                f"value of the prefix of {length} messages: {value}; expected a finite number: "
                "decide what failed continuations are worth, or value the prefix again"
            )


def _drops(values: Mapping[int, float], *, epsilon: float, threshold: float, monotone: bool, asked: int) -> Drops:
    steps = [(a, values[a], values[b]) for a, b in pairwise(sorted(values)) if b - a == 1]
    errors = (message for message, before, after in steps if _is_error(before, after, epsilon, threshold))
    first = next(errors, None)
    after_it = [step for step in steps if first is not None and step[0] > first]
    return Drops(
        first_error=first,
        repairs=tuple(message for message, before, after in after_it if after - before > epsilon),
        harmful=tuple(message for message, before, after in after_it if after - before < -epsilon),
        monotone=monotone, values=dict(sorted(values.items())), asked=asked,
    )  # fmt: skip


def first_error_by_scores(scores: Sequence[Sequence[float]], threshold: float = 0.5) -> tuple[int, int] | None:
    """(message, step) of the first step whose score is below the threshold; None when none is.

    `scores[t]` are a process reward model's scores of the steps of message t, in [0, 1]; nan, where it has none, is no
    error. Raises DataError for a score outside of [0, 1].
    """
    for message, steps in enumerate(scores):
        for step, score in enumerate(steps):
            if score < 0 or score > 1:
                raise DataError(
                    f"score of step {step} of message {message}: {score}; expected a probability, 0 to 1: "
                    "take the sigmoid of a reward model's logit"
                )
            if score < threshold:
                return message, step
    return None


def split_steps(text: str) -> tuple[str, ...]:
    """The steps of a turn: its lines that are not blank."""
    return tuple(line for line in text.splitlines() if line.strip())


def fault_by_value(path: Sequence[Turn], drops: Drops) -> Fault | None:
    """The fault that values of the path's prefixes show (`first_error_by_value`)."""
    if drops.first_error is None:
        return None
    before, after = drops.values[drops.first_error], drops.values[drops.first_error + 1]
    how = "" if drops.monotone else "; values rise again later, so all prefixes were valued"
    evidence = f"P(success) falls from {before:.3g} to {after:.3g}{how}"
    turn = drops.first_error
    return Fault(agent=path[turn].agent, turn=turn, step=None, method="value", evidence=evidence)


def fault_by_scores(path: Sequence[Turn], scores: Sequence[Sequence[float]], threshold: float = 0.5) -> Fault | None:
    """The first step of the path that a process reward model scores below the threshold (`first_error_by_scores`)."""
    assert len(scores) == len(path), f"scores of {len(scores)} messages for a path of {len(path)}"
    found = first_error_by_scores(scores, threshold)
    if found is None:
        return None
    turn, step = found
    evidence = f"score {scores[turn][step]:.3g} < {threshold:.3g}"
    return Fault(agent=path[turn].agent, turn=turn, step=step, method="process_reward", evidence=evidence)


def fault_by_arithmetic(path: Sequence[Turn], question: str = "") -> Fault | None:
    """The first step of the path that states something false (`arithmetic.first_wrong_step`, steps as in `split_steps`).

    Turns are read one by one, so that letters that another agent defines anew are no contradiction.
    """
    for turn, message in enumerate(path):
        found = first_wrong_step(split_steps(message.text), question)
        if found is not None:
            step, evidence = found
            return Fault(agent=message.agent, turn=turn, step=step, method="arithmetic", evidence=evidence)
    return None


def repairs(
    path: Sequence[Turn], first_error: int, *, epsilon: float, values: Mapping[int, float] | None = None
) -> tuple[int, ...]:
    """Turns after the first error that repair it and are to be spared blame, in order.

    A turn repairs if the value is known to rise by more than epsilon with it, or if it computes rightly an expression that
    the erroneous turn computed wrongly, and repeats none of its false statements.
    """
    known = values or {}
    wrong = {statement.expression for statement in check(path[first_error].text) if not statement.holds}
    return tuple(
        turn
        for turn in range(first_error + 1, len(path))
        if (turn in known and turn + 1 in known and known[turn + 1] - known[turn] > epsilon)
        or _corrects(path[turn].text, wrong)
    )


def _corrects(text: str, wrong: set[str]) -> bool:
    again = [statement.holds for statement in check(text) if statement.expression in wrong]
    return bool(again) and all(again)
