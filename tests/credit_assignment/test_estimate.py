"""The driver of estimates: batches go out, their values come back, the result comes last."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mas_hpc.credit_assignment.estimate import Estimate, answered


def asked_until(limit: float) -> Estimate[str, list[float]]:
    """Asks for a, then for b and c together, until an answer passes the limit."""
    answers: list[float] = []
    for batch in (["a"], ["b", "c"]):
        answers += yield batch
        if answers[-1] > limit:
            break
    return answers


def silent() -> Estimate[str, str]:
    if False:
        yield []
    return "asked nothing"


def test_each_batch_is_answered_in_order_and_the_result_returned() -> None:
    batches: list[Sequence[str]] = []

    def value(questions: Sequence[str]) -> list[float]:
        batches.append(questions)
        return [float(ord(question)) for question in questions]

    assert answered(asked_until(1000.0), value) == [97.0, 98.0, 99.0]
    assert batches == [["a"], ["b", "c"]]
    assert answered(asked_until(90.0), value) == [97.0]
    assert batches[2:] == [["a"]]


def test_an_estimate_may_ask_nothing() -> None:
    assert answered(silent(), lambda questions: [0.0] * len(questions)) == "asked nothing"


def test_an_exception_of_the_value_function_is_passed_on() -> None:
    def value(_: Sequence[str]) -> list[float]:
        raise StopIteration("of the engine, not of the estimate")

    with pytest.raises(StopIteration, match="of the engine"):
        answered(asked_until(0.0), value)
