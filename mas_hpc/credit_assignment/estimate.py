"""Estimates that ask for values instead of computing them, so that many games can share batches of model calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias, TypeVar

Question = TypeVar("Question")
Result = TypeVar("Result")

Estimate: TypeAlias = Generator[Sequence[Question], Sequence[float], Result]
"""Yields batches of questions, is sent their values in the same order, and returns its result."""


def answered(estimate: Estimate[Question, Result], value: Callable[[Sequence[Question]], Sequence[float]]) -> Result:
    """Drive an estimate to its end: `value` is called once a batch and gives one number a question, in order.

    Example: answered(exact(["a", "b"]), lambda coalitions: [len(coalition) for coalition in coalitions]).phi == (1.0, 1.0)
    """
    answers: Any = None  # starts the generator
    while True:
        try:
            questions = estimate.send(answers)
        except StopIteration as finished:
            return finished.value
        answers = value(questions)
