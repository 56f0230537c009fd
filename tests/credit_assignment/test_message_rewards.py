"""Rewards of messages against numbers worked out by hand, and the properties that the abstract of 2511.10687 demands."""

from __future__ import annotations

from math import fsum, inf, isnan, nan

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mas_hpc.credit_assignment.message_rewards import (
    FailureRewards,
    MessageRewardSettings,
    PreferencePair,
    failure_rewards,
    first_drop,
    message_rewards,
    preference_margins,
    repair_pairs,
    step_labels,
    success_rewards,
)
from mas_hpc.errors import DataError

FORMS = ("weighted", "signed")
SCRIPT = ["solver", "critic", "solver", "critic"]
VALUES = [0.5, 0.75, 0.5, 1.0, 0.875]  # progress: .25 -.25 .5 -.125
UNIT = st.floats(0, 1)
CREDIT = st.floats(-1, 1)


@st.composite
def successes(draw: st.DrawFn) -> tuple[list[str], dict[str, float], list[float] | None]:
    agents = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8))
    phi = {agent: draw(CREDIT) for agent in sorted(set(agents))}
    size = len(agents) + 1
    return agents, phi, draw(st.none() | st.lists(UNIT, min_size=size, max_size=size))


@st.composite
def failures(draw: st.DrawFn) -> tuple[list[float], dict[str, float]]:
    """Values of at least one message, and the settings of an outcome at or below the baseline."""
    outcome, baseline = sorted((draw(UNIT), draw(UNIT)))
    values = draw(st.lists(UNIT, min_size=2, max_size=9))
    settings = {"epsilon": draw(st.floats(0.01, 0.5)), "beta": draw(st.floats(0.01, 10)), "gamma": draw(st.floats(0, 10))}
    return values, {"outcome": outcome, "baseline": baseline, **settings}


def failed(values: list[float], total: float, *, beta: float = 1.0, gamma: float = 0.5, **more: int) -> FailureRewards:
    outcome, baseline = (0.0, -total) if total <= 0 else (total, 0.0)
    return failure_rewards(values, baseline=baseline, outcome=outcome, epsilon=0.1, beta=beta, gamma=gamma, **more)


def test_without_values_an_agent_splits_its_credit_evenly() -> None:
    agents = ["solver", "critic", "solver"]
    for form in FORMS:
        assert success_rewards(agents, {"solver": 0.5, "critic": -0.25}, None, form=form) == [0.25, -0.25, 0.25]


def test_credit_goes_by_the_progress_of_the_messages() -> None:
    rewards = success_rewards(SCRIPT, {"solver": 0.75, "critic": 0.25}, VALUES, form="weighted")
    assert rewards == pytest.approx([0.25, 0.125, 0.5, 0.125])  # solver 1:2; the critic made no progress: evenly


def test_messages_that_did_not_help_earn_nothing_of_a_credit() -> None:
    rewards = success_rewards(["a", "a", "b"], {"a": 0.5, "b": 0.25}, [0.5, 0.25, 0.75, 1.0], form="weighted")
    assert rewards == [0.0, 0.5, 0.25]


def test_the_blame_of_a_saboteur_falls_on_the_messages_that_did_harm() -> None:
    rewards = success_rewards(SCRIPT, {"solver": 0.9, "critic": -0.3}, VALUES, form="weighted")
    assert rewards == pytest.approx([0.3, -0.2, 0.6, -0.1])  # the critic's drops are .25 and .125
    assert success_rewards(["a", "a"], {"a": -0.5}, [0.5, 1.0, 0.75], form="weighted") == [0.0, -0.5]


def test_the_signed_form_adds_progress_above_the_mean_of_the_agent() -> None:
    rewards = success_rewards(SCRIPT, {"solver": 0.75, "critic": 0.25}, VALUES, form="signed", spread=0.5)
    # solver: .375 + .5 * (.25 - .375), .375 + .5 * (.5 - .375); critic: mean progress -.1875
    assert rewards == pytest.approx([0.3125, 0.09375, 0.4375, 0.15625])


def test_the_signed_form_shrinks_what_would_leave_the_bound_and_keeps_sum_and_order() -> None:
    # base .3; progress 1 -1 0 about mean 0; spread 2 would give 2.3: shrunk by .35 until the largest is 1
    rewards = success_rewards(["a"] * 3, {"a": 0.9}, [0.0, 1.0, 0.0, 0.0], form="signed", spread=2.0)
    assert rewards == pytest.approx([1.0, -0.4, 0.3])
    mirrored = success_rewards(["a"] * 3, {"a": -0.9}, [1.0, 0.0, 1.0, 1.0], form="signed", spread=2.0)
    assert mirrored == pytest.approx([-1.0, 0.4, -0.3])
    # progress -1 .5 .5: down from .3 there is room for 1.3 of 2, up for .7 of 1: shrunk by .65
    downwards = success_rewards(["a"] * 3, {"a": 0.9}, [1.0, 0.0, 0.5, 1.0], form="signed", spread=2.0)
    assert downwards == pytest.approx([-1.0, 0.95, 0.95])


def test_a_credit_beyond_one_is_its_own_bound() -> None:
    assert success_rewards(["a"], {"a": 3.0}, [0.0, 1.0], form="weighted") == [3.0]
    rewards = success_rewards(["a", "a"], {"a": 3.0}, [0.0, 1.0, 0.0], form="signed", spread=9.0)
    assert rewards == pytest.approx([3.0, 0.0])


@pytest.mark.parametrize("form", FORMS)
@given(successes(), st.floats(0, 5))
def test_each_agent_gets_its_credit_and_no_message_more_than_one(form: str, success: tuple, spread: float) -> None:
    agents, phi, values = success
    rewards = success_rewards(agents, phi, values, form=form, spread=spread)
    assert fsum(rewards) == pytest.approx(fsum(phi.values()), abs=1e-12)
    for agent, credit in phi.items():
        own = [reward for reward, author in zip(rewards, agents, strict=True) if author == agent]
        assert fsum(own) == pytest.approx(credit, abs=1e-12)
    assert max(abs(reward) for reward in rewards) <= 1 + 1e-12


@given(successes())
def test_weighted_rewards_have_the_sign_of_the_credit(success: tuple) -> None:
    agents, phi, values = success
    for agent, reward in zip(agents, success_rewards(agents, phi, values, form="weighted"), strict=True):
        assert reward * phi[agent] >= 0
        assert phi[agent] or reward == 0  # a null agent's messages get nothing


@pytest.mark.parametrize("form", FORMS)
@given(successes())
def test_rewards_do_not_depend_on_the_names_of_the_agents(form: str, success: tuple) -> None:
    agents, phi, values = success
    names = {"a": "z", "b": "y", "c": "x", "d": "w"}
    renamed = {names[agent]: credit for agent, credit in reversed(phi.items())}
    rewards = success_rewards([names[agent] for agent in agents], renamed, values, form=form)
    assert rewards == success_rewards(agents, phi, values, form=form)


@pytest.mark.parametrize("form", FORMS)
@given(CREDIT, st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
def test_twins_of_equal_credit_and_progress_earn_the_same(form: str, credit: float, first: float, second: float) -> None:
    assume(abs(first) > 1e-3 and abs(second) > 1e-3)  # else rounding decides how a message's progress compares
    values = [0.5, 0.5 + first, 0.5 + 2 * first, 0.5 + 2 * first + second, 0.5 + 2 * first + 2 * second]
    rewards = success_rewards(["a", "b", "a", "b"], {"a": credit, "b": credit}, values, form=form)
    assert rewards[0::2] == pytest.approx(rewards[1::2], abs=1e-9)


def test_a_role_without_outputs_cannot_carry_a_credit() -> None:
    with pytest.raises(DataError, match=r"agent 'critic': a role without outputs cannot carry its credit of 0\.25.*leave"):
        success_rewards(["solver"], {"solver": 0.75, "critic": 0.25}, None, form="weighted")
    with pytest.raises(DataError, match=r"credit of -0\.25"):
        success_rewards(["solver"], {"solver": 0.75, "critic": -0.25}, None, form="weighted")
    for nothing in (0.0, 1e-17):
        assert success_rewards(["solver"], {"solver": 0.75, "critic": nothing}, None, form="weighted") == [0.75]


def test_an_author_without_credit_is_named() -> None:
    with pytest.raises(DataError, match=r"agent 'critic' wrote message 1 but has no credit; expected one of \['solver'\]"):
        success_rewards(["solver", "critic"], {"solver": 1.0}, None, form="weighted")


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_value_that_is_no_number_is_named_by_its_prefix(bad: float) -> None:
    message = f"value of the prefix of 1 messages: {bad}; expected a finite number"
    with pytest.raises(DataError, match=message):
        success_rewards(["a", "a"], {"a": 1.0}, [0.5, bad, 0.5], form="weighted")
    with pytest.raises(DataError, match=message):
        failed([0.5, bad, 0.5], -0.5)
    with pytest.raises(DataError, match=message):
        step_labels([0.5, bad, 0.5], epsilon=0.1)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_values_of_other_than_all_prefixes_are_a_programming_error(outcome: float) -> None:
    with pytest.raises(AssertionError, match="2 messages have 3 prefixes, not 2"):
        message_rewards(
            ["a", "a"], phi={"a": 1.0}, values=[0.5, 1.0], outcome=outcome, baseline=0.5, settings=MessageRewardSettings()
        )


def test_the_first_error_pays_for_the_failure() -> None:
    assert failed([0.5, 0.75, 0.25, 0.25], -0.5) == FailureRewards(
        rewards=(0.0, -0.5, 0.0), first_error=1, repairs=(), harmful=(), residual=0.0
    )


def test_a_repair_is_rewarded_and_the_first_error_pays_for_it_too() -> None:
    result = failed([0.5, 0.25, 0.75], -0.5)
    assert result.rewards == pytest.approx([-0.75, 0.25])  # repair .5 * .5; total -.5
    assert (result.first_error, result.repairs, result.harmful, result.residual) == (0, (1,), (), 0.0)


def test_beta_and_gamma_set_how_faults_share_the_blame() -> None:
    result = failed([0.75, 0.5, 0.0], -0.6, beta=1.0, gamma=1.0)
    assert result.rewards == pytest.approx([-0.4, -0.2])  # 1 : 1 * .5
    assert result.harmful == (1,)
    assert failed([0.75, 0.5, 0.0], -0.6, beta=2.0, gamma=1.0).rewards == pytest.approx([-0.48, -0.12])


def test_noise_after_the_first_error_and_progress_before_it_get_nothing() -> None:
    # a drop within epsilon, progress, the error, then changes of .0625
    result = failed([0.5, 0.4375, 0.75, 0.5, 0.5625, 0.5], -0.25)
    assert result.rewards == (0.0, 0.0, -0.25, 0.0, 0.0)
    assert (result.first_error, result.repairs, result.harmful) == (2, (), ())


def test_a_fault_stops_at_minus_one_and_repairs_are_shrunk() -> None:
    # repair 1 * .75 would need a fault of -1.25: it stops at -1, which leaves .5
    assert failed([0.25, 0.0, 0.75], -0.5, gamma=1.0).rewards == pytest.approx([-1.0, 0.5])
    assert failed([0.25, 0.0, 0.75], -1.0, gamma=1.0).rewards == pytest.approx([-1.0, 0.0])


def test_repairs_above_one_are_shrunk_alike() -> None:
    # 4 * .5 and 4 * .25 become 1 and .5; faults 4 (beta), 4 * .25 share 1.5: 1.2 to .3, so they stop at 1 and .25, repairs 1.25
    result = failed([0.5, 0.25, 0.75, 0.5, 0.75], 0.0, beta=4.0, gamma=4.0)
    assert result.rewards == pytest.approx([-1.0, 1.25 * 2 / 3, -0.25, 1.25 / 3])


def test_at_the_baseline_faults_pay_for_repairs_and_without_repairs_all_is_zero() -> None:
    assert failed([0.5, 0.25, 0.75], 0.0).rewards == pytest.approx([-0.25, 0.25])
    assert failed([0.5, 0.25, 0.25], 0.0).rewards == (0.0, 0.0)


def test_without_a_first_error_the_messages_share_the_total() -> None:
    assert failed([0.5, 0.5, 0.5625, 0.5, 0.5], -0.5) == FailureRewards(
        rewards=(-0.125,) * 4, first_error=None, repairs=(), harmful=(), residual=0.0
    )


def test_a_failure_above_the_baseline_is_paid_to_repairs_or_left_as_residual() -> None:
    paid = failed([0.5, 0.25, 0.75, 0.75], 0.5)
    assert (paid.rewards, paid.residual) == ((0.0, 0.5, 0.0), 0.0)
    assert failed([0.5, 0.25, 0.75], 0.125).rewards == pytest.approx([-0.125, 0.25])
    unpaid = failed([0.5, 0.25, 0.25], 0.25)
    assert (unpaid.rewards, unpaid.residual) == ((0.0, 0.0), 0.25)


def test_a_localizer_may_name_another_first_error_than_the_first_drop() -> None:
    values = [0.75, 0.5, 0.5, 0.75]
    assert failed(values, -0.5).first_error == 0
    named = failed(values, -0.5, first_error=1)
    assert named.rewards == pytest.approx([0.0, -0.625, 0.125])  # the drop before it is spared
    assert (named.first_error, named.repairs) == (1, (2,))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_first_error_outside_the_episode_is_a_programming_error(wrong: int) -> None:
    with pytest.raises(AssertionError, match="of 2 messages"):
        failed([0.5, 0.5, 0.5], -0.5, first_error=wrong)


def test_a_failure_without_messages_or_without_blame_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="no message"):
        failed([0.5], -0.5)
    with pytest.raises(AssertionError, match=r"beta=0\.0"):
        failed([0.5, 0.25], -0.5, beta=0.0)


@given(failures())
def test_failures_conserve_the_total_within_bounds_and_signs(failure: tuple) -> None:
    values, settings = failure
    result = failure_rewards(values, **settings)
    total = settings["outcome"] - settings["baseline"]
    assert result.residual == 0.0
    assert fsum(result.rewards) == pytest.approx(total, abs=1e-12)
    assert max(abs(reward) for reward in result.rewards) <= 1 + 1e-12
    if result.first_error is not None:
        faults = {result.first_error, *result.harmful}
        for number, reward in enumerate(result.rewards):
            assert reward <= 0 if number in faults else reward >= 0
            assert number in {*faults, *result.repairs} or reward == 0
        assert result.rewards[result.first_error] < 0 or abs(total) < 1e-300  # which may round to 0


@given(failures())
def test_failures_above_the_baseline_conserve_with_their_residual(failure: tuple) -> None:
    values, settings = failure
    settings["outcome"], settings["baseline"] = settings["baseline"], settings["outcome"]
    result = failure_rewards(values, **settings)
    assert fsum([*result.rewards, result.residual]) == pytest.approx(settings["outcome"] - settings["baseline"], abs=1e-12)
    assert max(abs(reward) for reward in result.rewards) <= 1 + 1e-12
    assert all(result.rewards[number] >= 0 for number in result.repairs)
    assert all(result.rewards[number] <= 0 for number in result.harmful)


@given(st.lists(UNIT, min_size=2, max_size=9), UNIT)
def test_the_total_is_zero_when_the_outcome_is_the_baseline(values: list[float], outcome: float) -> None:
    result = failure_rewards(values, baseline=outcome, outcome=outcome, epsilon=0.05, beta=1.0, gamma=2.0)
    assert fsum(result.rewards) == pytest.approx(0.0, abs=1e-12)


def test_the_first_drop_reaches_epsilon() -> None:
    assert first_drop([0.5, 0.375, 0.25, 0.75], epsilon=0.125) == 0
    assert first_drop([0.5, 0.4375, 0.25, 0.75], epsilon=0.125) == 1
    assert first_drop([0.5, 0.4375, 0.375, 0.75], epsilon=0.125) is None
    with pytest.raises(AssertionError, match="without effect"):
        first_drop([0.5, 0.5], epsilon=0.0)


def test_an_outcome_at_the_threshold_is_a_success() -> None:
    settings = MessageRewardSettings(threshold=0.75, form="signed", spread=0.5)
    result = message_rewards(
        SCRIPT, phi={"solver": 0.25, "critic": 0.0}, values=VALUES, outcome=0.75, baseline=0.5, settings=settings
    )
    # solver .125 -/+ .5 * .125; critic 0 -/+ .5 * .0625
    assert result.rewards == pytest.approx([0.0625, -0.03125, 0.1875, 0.03125])
    assert (result.succeeded, result.failure, result.residual) == (True, None, pytest.approx(0.0))


def test_a_success_leaves_what_phi_does_not_explain_as_residual() -> None:
    result = message_rewards(
        ["a", "b"], phi={"a": 0.5, "b": 0.125}, values=None, outcome=1.0, baseline=0.25, settings=MessageRewardSettings()
    )
    assert (result.rewards, result.residual) == ((0.5, 0.125), 0.125)  # v(N) was .875 over the replays


def test_an_outcome_below_the_threshold_is_a_failure_whatever_phi_says() -> None:
    settings = MessageRewardSettings(epsilon=0.2, beta=2.0, gamma=1.0)
    result = message_rewards(SCRIPT, phi={}, values=VALUES, outcome=0.25, baseline=0.5, settings=settings)
    assert result.failure == failure_rewards(VALUES, baseline=0.5, outcome=0.25, epsilon=0.2, beta=2.0, gamma=1.0)
    assert not result.succeeded
    assert result.rewards == pytest.approx([0.0, -0.75, 0.5, 0.0])  # repair of .5; -.125 is within epsilon


def test_a_failure_without_values_blames_the_message_that_was_found_or_all() -> None:
    episode = {"phi": {}, "values": None, "outcome": 0.0, "baseline": 0.5, "settings": MessageRewardSettings()}
    assert message_rewards(["a", "b"], first_error=1, **episode).rewards == (0.0, -0.5)
    assert message_rewards(["a", "b"], **episode).rewards == (-0.25, -0.25)


SIBLINGS = [("q/1.0", 0.25), ("q/1.1", 0.75), ("q/1.2", 0.25), ("q/1.3", 0.5), ("q/1.4", nan), ("q/1.5", 0.0)]


def test_margins_are_measured_from_the_erroneous_turn() -> None:
    assert preference_margins(SIBLINGS[:4], "q/1.0") == {"q/1.1": 0.5, "q/1.2": 0.0, "q/1.3": 0.25}


def test_repaired_turns_are_preferred_to_the_erroneous_one_at_the_same_prefix() -> None:
    pair = PreferencePair(prefix_turn="q/0.1", chosen="q/1.1", rejected="q/1.0", margin=0.5)
    other = PreferencePair(prefix_turn="q/0.1", chosen="q/1.3", rejected="q/1.0", margin=0.25)
    for min_margin, expected in ((0.0, (pair, other)), (0.25, (pair, other)), (0.3, (pair,)), (0.6, ())):
        assert repair_pairs(SIBLINGS, "q/1.0", prefix_turn="q/0.1", min_margin=min_margin) == expected


def test_an_erroneous_turn_that_is_no_sibling_and_siblings_of_one_id_are_programming_errors() -> None:
    for siblings, erroneous in ((SIBLINGS, "q/2.0"), ([*SIBLINGS, SIBLINGS[0]], "q/1.0")):
        with pytest.raises(AssertionError, match="distinct siblings"):
            preference_margins(siblings, erroneous)


def test_step_labels_are_soft_by_value_and_hard_by_the_first_error() -> None:
    labels = step_labels([0.5, 0.6, 0.2, 0.4, 0.1], epsilon=0.1)
    assert labels.soft == (0.6, 0.2, 0.4, 0.1)
    assert labels.hard[:2] == (1.0, 0.0) and all(map(isnan, labels.hard[2:]))


def test_hard_labels_are_all_right_without_an_error_and_follow_a_given_one() -> None:
    assert step_labels([0.5, 0.5, 0.75], epsilon=0.1).hard == (1.0, 1.0)
    given_error = step_labels([0.5, 0.0, 0.75, 0.75], epsilon=0.1, first_error=2)
    assert given_error.hard == (1.0, 1.0, 0.0)
