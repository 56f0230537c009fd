"""First errors by value, by score and by arithmetic: against scans by hand, with the questions counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.credit_assignment.error_localization import (
    Drops,
    Fault,
    fault_by_arithmetic,
    fault_by_scores,
    fault_by_value,
    first_error_by_scores,
    first_error_by_value,
    repairs,
    split_steps,
)
from mas_hpc.credit_assignment.estimate import answered
from mas_hpc.credit_assignment.message_rewards import first_drop
from mas_hpc.errors import DataError
from mas_hpc.types import Turn

EPSILON = 0.25
EIGHTHS = st.integers(0, 8).map(lambda eighths: eighths / 8)  # exact in binary: no rounding at epsilon


def localize(values: Sequence[float], threshold: float = 0.0, known: dict[int, float] | None = None) -> tuple[Drops, list[int]]:
    """The result, and the prefixes that were asked, in order."""
    asked: list[int] = []

    def value(lengths: Sequence[int]) -> list[float]:
        asked.extend(lengths)
        return [values[length] for length in lengths]

    search = first_error_by_value(len(values) - 1, epsilon=EPSILON, threshold=threshold, known=known)
    return answered(search, value), asked


def message(agent: str, text: str) -> Turn:
    return Turn(
        id=agent, parent=None, task_id="q", agent=agent, policy="p", index=0, prompt_ids=(), prompt_spans=(),
        completion_ids=(), behavior_logprobs=(), text=text, finish="stop", committed=True,
    )  # fmt: skip


def test_the_first_drop_is_found_with_its_neighbours_asked() -> None:
    drops, asked = localize([0.75, 0.75, 0.75, 0.25, 0.25])
    assert (drops.first_error, drops.repairs, drops.harmful, drops.monotone) == (2, (), (), True)
    assert drops.asked == len(asked) == len(set(asked))
    assert {2, 3} <= set(asked)


@pytest.mark.parametrize("num_messages", [1, 2, 3, 8, 100, 1000])
def test_one_drop_costs_a_logarithm_of_the_messages(num_messages: int) -> None:
    for culprit in {0, num_messages // 3, num_messages - 1}:
        values = [1.0] * (culprit + 1) + [0.0] * (num_messages - culprit)
        drops, asked = localize(values)
        assert (drops.first_error, drops.monotone) == (culprit, True)
        # both ends, one value a halving, and one probe in each gap that is left
        assert len(asked) <= 3 + 2 * math.ceil(math.log2(num_messages))


def test_without_a_drop_only_the_ends_and_the_middle_are_asked() -> None:
    drops, asked = localize([0.5] * 101)
    assert drops.first_error is None and sorted(asked) == [0, 50, 100]


def test_a_known_outcome_is_not_asked() -> None:
    drops, asked = localize([1.0, 1.0, 0.0], known={2: 0.0})
    assert drops.first_error == 1 and sorted(asked) == [0, 1] and drops.asked == 2


def test_a_repair_that_shows_leads_to_a_scan_that_finds_the_error_before_it() -> None:
    drops, _ = localize([1.0, 0.0, 0.0, 0.5, 1.0, 0.5, 0.5, 0.5, 0.0])
    assert not drops.monotone and drops.asked == 9
    assert (drops.first_error, drops.repairs, drops.harmful) == (0, (2, 3), (4, 7))


def test_a_change_of_exactly_epsilon_is_an_error_but_after_one_neither_harm_nor_repair() -> None:
    drops, _ = localize([1.0, 0.75, 1.0, 0.75, 0.0])
    assert (drops.first_error, drops.repairs, drops.harmful) == (0, (), (3,))


def test_crossing_the_threshold_is_an_error_though_the_drop_is_small() -> None:
    values = [0.5, 0.5, 0.375, 0.375, 0.375]
    assert localize(values)[0].first_error is None
    assert localize(values, threshold=0.4)[0].first_error == 1


def test_a_value_that_is_not_finite_is_refused_with_its_prefix() -> None:
    with pytest.raises(DataError, match="prefix of 2 messages: nan"):
        localize([1.0, 1.0, math.nan])


@given(st.lists(EIGHTHS, min_size=2, max_size=12).map(lambda values: sorted(values, reverse=True)))
def test_where_values_never_rise_bisection_finds_what_a_scan_finds(values: list[float]) -> None:
    drops, asked = localize(values)
    assert drops.monotone and len(asked) <= len(values)
    first = first_drop(values, epsilon=EPSILON)
    assert drops.first_error == first
    falls = [message for message, (before, after) in enumerate(pairwise(values)) if after - before < -EPSILON]
    assert drops.harmful == tuple(message for message in falls if first is not None and message > first)


@given(st.lists(EIGHTHS, min_size=2, max_size=12))
def test_whatever_is_called_not_monotone_has_been_scanned_whole(values: list[float]) -> None:
    drops, asked = localize(values)
    assert drops.values == {length: values[length] for length in sorted(asked)}
    if not drops.monotone:
        assert len(asked) == len(values) and drops.first_error == first_drop(values, epsilon=EPSILON)
        assert any(later - earlier > EPSILON for i, earlier in enumerate(values) for later in values[i:])
    if drops.first_error is not None:
        assert values[drops.first_error + 1] <= values[drops.first_error] - EPSILON


def test_the_first_step_below_the_threshold_is_the_error() -> None:
    scores = [[0.9, math.nan], [], [0.5, 0.49, 0.1]]
    assert first_error_by_scores(scores) == (2, 1)
    assert first_error_by_scores(scores, threshold=0.1) is None
    with pytest.raises(DataError, match=r"step 0 of message 1: -2.0; expected a probability"):
        first_error_by_scores([[0.9], [-2.0]])


def test_faults_name_agent_turn_step_and_evidence() -> None:
    path = [message("solver", "We add.\n\n2 + 3 = 6\nSo 6."), message("critic", "2 + 3 = 5")]
    assert fault_by_arithmetic(path) == Fault(
        agent="solver", turn=0, step=1, method="arithmetic", evidence="2 + 3 = 6: the left side is 5, not 6"
    )
    assert fault_by_scores(path, [[0.9, 0.8, 0.7], [0.25]]) == Fault(
        agent="critic", turn=1, step=0, method="process_reward", evidence="score 0.25 < 0.5"
    )
    drops, _ = localize([1.0, 1.0, 0.0])
    assert fault_by_value(path, drops) == Fault(
        agent="critic", turn=1, step=None, method="value", evidence="P(success) falls from 1 to 0"
    )


def test_a_path_without_an_error_has_no_fault() -> None:
    path = [message("solver", "2 + 3 = 5"), message("critic", "fine")]
    assert fault_by_arithmetic(path) is None
    assert fault_by_scores(path, [[0.9], [0.8]]) is None
    assert fault_by_value(path, localize([0.5, 0.5, 0.5])[0]) is None


def test_a_letter_that_another_agent_defines_anew_is_no_contradiction() -> None:
    path = [message("solver", "A = 2 + 3 = 5"), message("critic", "A = 2 * 3 = 6")]
    assert fault_by_arithmetic(path) is None
    late = [*path, message("reviser", "Hm.\nA = 2 * 3 = 7")]
    assert fault_by_arithmetic(late) == Fault(
        agent="reviser", turn=2, step=1, method="arithmetic", evidence="2 * 3 = 7: the left side is 6, not 7"
    )
    again = [message("solver", path[0].text + "\n" + path[1].text)]
    assert fault_by_arithmetic(again) is not None


def test_evidence_says_when_values_rose_again() -> None:
    path = [message("solver", ""), message("critic", ""), message("reviser", "")]
    fault = fault_by_value(path, localize([1.0, 0.0, 1.0, 0.0])[0])
    assert fault is not None and fault.turn == 0 and "all prefixes were valued" in fault.evidence


def test_steps_of_a_turn_are_its_lines_that_are_not_blank() -> None:
    assert split_steps("one\n\n  \n two\n") == ("one", " two")


def test_a_later_turn_that_computes_the_wrong_expression_rightly_is_a_repair() -> None:
    texts = ["4 + 4 = 8, and 12 * 3 = 35", "so 35", "No: 12 x 3 = 36", "12 * 3 = 35, I insist, not 12 * 3 = 36", "4 + 4 = 8"]
    path = [message("solver", text) for text in texts]
    assert repairs(path, 0, epsilon=EPSILON) == (2,)


def test_a_later_turn_that_raises_the_value_is_a_repair() -> None:
    path = [message("solver", "") for _ in range(4)]
    assert repairs(path, 0, epsilon=EPSILON, values={0: 1.0, 1: 0.0, 2: 0.25, 3: 0.75, 4: 0.75}) == (2,)
    assert repairs(path, 0, epsilon=EPSILON, values={0: 1.0, 1: 0.0, 3: 0.75}) == ()
