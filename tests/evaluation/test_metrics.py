"""Evaluation statistics against numbers worked out by hand or published."""

import pytest

from mas_hpc.answers import majority
from mas_hpc.evaluation.metrics import balanced_verdicts, paired_test, tokens_per_question, wilson
from mas_hpc.types import Task, Trace, Turn


def outcomes(both, only_after, only_before, neither):
    before = [True] * both + [False] * only_after + [True] * only_before + [False] * neither
    after = [True] * (both + only_after) + [False] * (only_before + neither)
    return before, after


def test_wilson_of_half_is_symmetric_and_matches_the_formula():
    low, high = wilson(5, 10)  # half width = z / (2 sqrt(n + z^2)) at share 1/2, with z = 1.959964
    half = 1.959964 / (2 * (10 + 1.959964**2) ** 0.5)
    assert (low, high) == (pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half, abs=1e-6))


def test_wilson_at_the_ends_keeps_the_sure_bound():
    low, high = wilson(0, 10)  # upper bound z^2 / (n + z^2)
    assert low == 0.0
    assert high == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    assert wilson(10, 10) == (pytest.approx(1 - high), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_counts_only_discordant_questions():
    test = paired_test(*outcomes(5, 8, 1, 6))
    assert (test.wins, test.losses, test.difference) == (8, 1, pytest.approx(7 / 20))
    assert test.p_value == pytest.approx(2 * (1 + 9) / 2**9)  # two-sided: 2 P(X <= 1), X ~ Binomial(9, 1/2)


def test_equal_systems_have_p_value_one():
    assert paired_test(*outcomes(3, 0, 0, 2)).p_value == 1.0
    assert paired_test(*outcomes(0, 2, 2, 0)).p_value == 1.0


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al., Statistics with Confidence (2000), table 6.2
        ((1, 1, 7, 12), -0.507, -0.026),  # Bentur et al. 2009, an example of the R package contingencytables
    ],
)
def test_paired_interval_matches_published_examples(table, low, high):
    test = paired_test(*outcomes(*table))
    assert (test.low, test.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_swapping_the_systems_mirrors_the_interval():
    before, after = outcomes(20, 9, 4, 7)
    one, other = paired_test(before, after), paired_test(after, before)
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


def test_different_questions_cannot_be_paired():
    with pytest.raises(ValueError):
        paired_test([True], [True, False])


def test_verdicts_are_balanced_over_the_truth():
    pairs = [(True, True)] * 6 + [(None, True)] * 2 + [(False, False), (True, False), (None, False), (True, False)]
    balance = balanced_verdicts(pairs)
    assert (balance.recall_right, balance.recall_wrong) == (6 / 8, 1 / 4)
    assert (balance.balanced_accuracy, balance.unreadable, balance.n) == (0.5, 3, 12)


def test_balance_is_undefined_when_one_class_is_absent():
    balance = balanced_verdicts([(True, True), (None, True)])
    assert (balance.recall_right, balance.recall_wrong, balance.balanced_accuracy) == (0.5, None, None)


def test_majority_takes_the_first_seen_among_equals_and_never_none():
    assert majority(["7", "3", "3", "7", None, None, None]) == "7"
    assert majority(["7", "3", "3"]) == "3"
    assert majority([None, None]) is None
    assert majority([]) is None


def test_tokens_count_every_try_but_not_the_turns_that_only_value_another():
    def turn(length, **fields):
        return Turn(
            id="t", parent=None, task_id="q", agent="solver", policy="shared", index=0, prompt_ids=(1,),
            prompt_spans=(("", 1),), completion_ids=(5,) * length, behavior_logprobs=(0.0,) * length, text="",
            finish="stop", **fields,
        )  # fmt: skip

    task = Task(id="q", question="?", answer="1")
    first = Trace(task=task, turns=(turn(3, committed=True), turn(4), turn(90, counterfactual=True)))
    assert tokens_per_question([first, Trace(task=task, turns=(turn(2, committed=True),))]) == (7 + 2) / 2
