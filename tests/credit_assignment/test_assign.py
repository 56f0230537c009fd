"""From turns to samples, and the advantages of their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from mas_hpc.credit_assignment.assign import to_samples, with_advantages, with_returns
from mas_hpc.types import Sample, Task, Trace, Turn


def sample(number: int, *values: float) -> Sample:
    """One token a value."""
    return Sample(
        id=str(number), tree="q", agent="a", policy="p", prompt_ids=(1,), prompt_spans=(("", 1),),
        completion_ids=tuple(range(len(values))), columns={"old_value": values},
    )  # fmt: skip


def rewards(*rows: tuple[float, ...]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, [0.46575, 0.385, 0.3]), (0.99, [0.446829, 0.37515, 0.3])])
def test_g24_two_turns_of_one_trajectory_are_one_sequence(gamma: float, expected: list[float]) -> None:
    samples = [sample(0, 0.5), sample(1, 9.0, 9.0), sample(2, 0.6, 0.7)]
    found = with_advantages(
        samples, ["x", "other", "x"], rewards((0.0,), (0.0, 1.0), (0.0, 1.0)), gamma=gamma, lam=0.95, whitened=False
    )
    first, _, last = (row.columns for row in found)
    assert first["advantage"] + last["advantage"] == pytest.approx(expected, abs=1e-6)
    assert first["return"] + last["return"] == pytest.approx(np.add(expected, [0.5, 0.6, 0.7]), abs=1e-6)
    assert [len(row.columns["advantage"]) for row in found] == [1, 2, 2]


def test_g23_advantages_are_whitened_over_the_batch_and_returns_are_not() -> None:
    samples = [sample(0, 0.0), sample(1, 0.0, 0.0), sample(2, 0.0)]
    given = rewards((1.0,), (2.0, 3.0), (4.0,))
    plain, white = (
        with_advantages(samples, [0, 1, 2], given, gamma=0.0, lam=0.0, whitened=whitened) for whitened in (False, True)
    )
    assert [value for row in white for value in row.columns["advantage"]] == pytest.approx(
        [-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-6
    )
    for rows in (plain, white):
        assert [value for row in rows for value in row.columns["return"]] == [1.0, 2.0, 3.0, 4.0]


def test_returns_run_through_the_turns_of_a_trajectory_and_are_whitened() -> None:
    samples = [sample(0, 0.0), sample(1, 0.0), sample(2, 0.0, 0.0)]
    found = with_returns(samples, ["x", "y", "x"], rewards((0.0,), (2.0,), (0.0, 4.0)), gamma=0.5)
    # returns: x 1, 2, 4 and y 2
    values = np.array([1.0, 2.0, 2.0, 4.0])
    expected = (values - values.mean()) / values.std(ddof=1)
    assert [value for row in found for value in row.columns["advantage"]] == pytest.approx(expected, abs=1e-6)


def test_a_trajectory_of_one_token_has_reward_minus_value() -> None:
    [found] = with_advantages([sample(0, 0.25)], ["x"], rewards((1.0,)), gamma=0.9, lam=0.5, whitened=False)
    assert found.columns == {"old_value": (0.25,), "advantage": (0.75,), "return": (1.0,)}


def test_no_samples_are_no_samples() -> None:
    assert with_returns([], [], [], gamma=1.0) == []
    assert with_advantages([], [], [], gamma=1.0, lam=1.0, whitened=True) == []


def turn(name: str, credit: float | None, completion: tuple[int, ...]) -> Turn:
    return Turn(
        id=name, parent=None, task_id="q", agent="solver", policy="p", index=0, prompt_ids=(1, 2), prompt_spans=(("", 2),),
        completion_ids=completion, behavior_logprobs=(-0.5,) * len(completion), text="", finish="stop", credit=credit,
    )  # fmt: skip


def test_turns_with_credit_and_tokens_become_samples_of_one_tree() -> None:
    turns = (turn("a", 1.5, (3, 4)), turn("b", None, (3,)), turn("c", 2.0, ()), turn("d", 0.0, (5,)))
    trace = Trace(task=Task(id="q", question="", answer=""), turns=turns, step=7)
    first, last = to_samples([trace])
    assert first == Sample(
        id="a", tree="7/q", agent="solver", policy="p", prompt_ids=(1, 2), prompt_spans=(("", 2),), completion_ids=(3, 4),
        behavior_logprobs=(-0.5, -0.5), advantage=1.5,
    )  # fmt: skip
    assert (last.id, last.advantage) == ("d", 0.0)
