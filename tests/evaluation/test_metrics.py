"""Evaluation statistics against numbers worked out by hand or published."""

import math
from itertools import combinations, permutations
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.answers import majority
from mas_hpc.errors import DataError
from mas_hpc.evaluation.metrics import (
    avg_at_k,
    balanced_verdicts,
    clustered_mean,
    maj_at_k,
    noise_k,
    paired_t,
    paired_test,
    pass_at_k,
    t_interval,
    t_quantile,
    tokens_per_correct,
    tokens_per_question,
    wilson,
)
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


def turn(length, **fields):
    return Turn(
        id="t", parent=None, task_id="q", agent="solver", policy="shared", index=0, prompt_ids=(1,),
        prompt_spans=(("", 1),), completion_ids=(5,) * length, behavior_logprobs=(0.0,) * length, text="",
        finish="stop", **fields,
    )  # fmt: skip


TASK = Task(id="q", question="?", answer="1")


def test_tokens_count_every_try_but_not_the_turns_that_only_value_another():
    first = Trace(task=TASK, turns=(turn(3, committed=True), turn(4), turn(90, counterfactual=True)))
    assert tokens_per_question([first, Trace(task=TASK, turns=(turn(2, committed=True),))]) == (7 + 2) / 2


def test_wrong_and_ungraded_traces_cost_tokens_but_are_not_right():
    traces = [Trace(task=TASK, turns=(turn(10),), reward=reward) for reward in (1.0, 0.0, None, 1.0)]
    assert tokens_per_correct(traces) == 40 / 2
    assert tokens_per_correct(traces[1:3]) is None


def test_pass_at_k_is_one_minus_the_chance_of_a_wrong_draw():
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # one of C(5, 3) = 10 draws has only wrong samples
    assert pass_at_k(5, 2, 4) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0


def test_pass_at_k_equals_the_product_of_chen_et_al_figure_3():
    n, c, k = 200, 7, 100
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)), rel=1e-12)


@pytest.mark.parametrize("k", [0, 6])
def test_k_lies_between_one_and_the_number_of_samples(k):
    with pytest.raises(DataError, match=f"pass@{k}: expected k from 1 to the samples of a question, 5"):
        pass_at_k(5, 2, k)
    with pytest.raises(DataError, match=f"maj@{k}: expected k from 1 to the samples of a question, 5"):
        maj_at_k(["1"] * 5, lambda answer: True, k)


def test_avg_at_k_has_the_error_of_the_question_means():
    found = avg_at_k([[True, True], [True, False], [False, False]])  # means 1, 1/2, 0: deviation 1/2
    assert (found.mean, found.n, found.num_clusters) == (0.5, 6, 3)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(3))


def test_avg_at_k_of_samples_that_repeat_has_no_smaller_error_than_of_one_sample():
    once = [[True], [False], [True], [True]]
    error = stdev([1, 0, 1, 1]) / 2
    assert avg_at_k(once).standard_error == pytest.approx(error)
    assert avg_at_k([samples * 8 for samples in once]).standard_error == pytest.approx(error)


def test_avg_at_k_refuses_questions_with_unequal_samples():
    with pytest.raises(DataError, match="question 1 has 1 samples, the first has 2"):
        avg_at_k([[True, False], [True]])
    with pytest.raises(DataError, match="question 0 has 0 samples"):
        avg_at_k([[]])


def test_clusters_of_unequal_size_weigh_by_value():
    found = clustered_mean([[1.0, 1.0, 1.0], [0.0], []])  # mean 3/4, sums of deviations 3/4 and -3/4, G = 2
    assert (found.mean, found.n, found.num_clusters) == (0.75, 4, 2)
    assert found.standard_error == pytest.approx(math.sqrt(2 * 2 * 9 / 16) / 4)


def test_one_cluster_has_no_error():
    assert clustered_mean([[1.0, 0.0]]).standard_error is None


@pytest.mark.parametrize(
    ("accuracy", "num_questions", "k"),
    [(0.30, 60, 16), (0.75, 40, 21), (0.89, 500, 1), (0.64, 272, 4)],  # the suites of C3: its table has 16, 16, 4 and 4
)
def test_noise_k_is_the_first_below_the_target(accuracy, num_questions, k):
    assert noise_k([accuracy], num_questions) == k

    def noise(k):
        return math.sqrt(accuracy * (1 - accuracy) / (num_questions * k))

    assert noise(k) < 0.015 and (k == 1 or noise(k - 1) >= 0.015)


def test_noise_k_takes_the_mean_over_questions():
    # p(1-p): 0, 1/4, 0, 1/4; mean 1/8; sqrt(1/8 / (2 k)) < 1/4 needs k > 1
    assert noise_k([0.0, 0.5, 1.0, 0.5], 2, target=0.25) == 2
    assert noise_k([0.0, 1.0], 2) == 1


def test_majority_of_two_with_a_tie_is_half():
    assert maj_at_k(["1", "2", None], lambda answer: answer == "1", 2) == pytest.approx((0.5 + 1 + 0) / 3)


def test_majority_of_three_by_hand():
    # of C(5, 3) = 10 draws from 1 1 1 2 3 right has two or three votes in 7; the tie 1 2 3, thrice, goes to it one time in 3
    assert maj_at_k(["1", "1", "1", "2", "3"], lambda answer: answer == "1", 3) == pytest.approx((7 + 3 / 3) / 10)


def test_a_majority_without_answers_is_wrong():
    assert maj_at_k([None, None], lambda answer: True, 2) == 0.0


@given(st.lists(st.sampled_from(["1", "1.0", "2", "3", None]), min_size=1, max_size=6), st.data())
def test_maj_at_k_is_the_mean_over_all_orders_of_arrival(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    right = {"1", "1.0"}
    expected = fmean(majority(drawn) in right for drawn in permutations(answers, k))
    assert maj_at_k(answers, right.__contains__, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_many_samples_is_binomial():
    # 40 right of 64, two answers, odd k: right wins with more than half of the votes (hypergeometric)
    wins = sum(math.comb(40, right) * math.comb(24, 33 - right) for right in range(17, 34))
    answers = ["1"] * 40 + ["2"] * 24
    assert maj_at_k(answers, lambda answer: answer == "1", 33) == pytest.approx(wins / math.comb(64, 33), rel=1e-12)


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (6, 2.571), (31, 2.042), (121, 1.980)])
def test_half_width_matches_the_printed_table_of_student_t(n, quantile):
    values = [float(value) for value in range(n)]
    assert t_interval(values).half_width == pytest.approx(quantile * stdev(values) / math.sqrt(n), rel=4e-4)
    assert t_quantile(n - 1) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99, 0.999])
def test_quantiles_of_one_and_two_degrees_have_closed_forms(confidence):
    cauchy = math.tan(math.pi * confidence / 2)
    assert t_interval([-1.0, 1.0], confidence).half_width == pytest.approx(cauchy, rel=1e-9)  # deviation / sqrt(2) = 1
    two = confidence * math.sqrt(2 / (1 - confidence**2))
    assert t_interval([-1.0, 0.0, 1.0], confidence).half_width == pytest.approx(two / math.sqrt(3), rel=1e-9)


def test_one_seed_has_a_mean_and_no_interval():
    assert (t_interval([0.7]).mean, t_interval([0.7]).half_width, t_interval([0.7]).n) == (0.7, None, 1)
    assert (paired_t([0.7]).half_width, paired_t([0.7]).p_value) == (None, None)


def test_paired_t_on_student_s_sleep_data():
    # Student 1908, Biometrika 6:1, and R's t.test(extra ~ group, data = sleep, paired = TRUE): t = -4.0621, p = 0.002833
    differences = [-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4]
    found = paired_t(differences)
    assert (found.mean, found.n) == (pytest.approx(-1.58), 10)
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert found.mean - found.half_width == pytest.approx(-2.4598858, abs=1e-6)
    assert found.mean + found.half_width == pytest.approx(-0.7001142, abs=1e-6)


def test_differences_that_cancel_have_p_value_one():
    assert paired_t([-1.0, 1.0, -2.0, 2.0]).p_value == pytest.approx(1.0)


def test_t_is_undefined_when_all_differences_are_equal():
    assert (paired_t([0.5, 0.5]).p_value, paired_t([0.5, 0.5]).half_width) == (None, 0.0)


@settings(max_examples=30)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8).filter(lambda values: len(set(values)) > 1))
def test_the_test_rejects_at_five_percent_exactly_when_the_interval_leaves_out_zero(values):
    found = paired_t([float(value) for value in values])
    assert (found.p_value < 0.05) == (abs(found.mean) > found.half_width)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_mean_over_all_draws(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = combinations([True] * c + [False] * (n - c), k)
    assert pass_at_k(n, c, k) == pytest.approx(fmean(any(draw) for draw in draws))
