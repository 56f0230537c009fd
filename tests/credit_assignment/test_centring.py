"""What centring erases, and weights that leave the order of siblings alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.credit_assignment.centring import Centring, credit_weights, erased_by_centring, guarded
from mas_hpc.credit_assignment.group_relative import group_relative

CREDITS = st.dictionaries(st.sampled_from("abcdef"), st.floats(-1, 1), min_size=1)


def test_variance_between_groups_is_erased() -> None:
    # mean .625; squares .140625 .140625 .390625 .015625; within: 0 0 .0625 .0625
    assert erased_by_centring([1.0, 1.0, 0.0, 0.5], ["a", "a", "b", "b"]) == Centring(
        total_variance=0.171875,
        within_variance=0.03125,
        erased_share=pytest.approx(1 - 2 / 11),
        num_constant_groups=1,
        num_groups=2,
    )


def test_credit_constant_in_each_group_is_erased_whole() -> None:
    # a third is not representable, so the mean of three could differ in the last bit
    centring = erased_by_centring([1 / 3] * 3 + [0.1] * 3, [("q", "solver")] * 3 + [("q", "critic")] * 3)
    assert (centring.within_variance, centring.erased_share, centring.num_constant_groups) == (0.0, 1.0, 2)
    assert centring.total_variance == pytest.approx((7 / 60) ** 2)


def test_credit_that_varies_only_inside_groups_survives_whole() -> None:
    centring = erased_by_centring([1.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b"])
    assert (centring.within_variance, centring.erased_share, centring.num_constant_groups) == (0.25, 0.0, 0)


def test_of_a_constant_credit_nothing_is_left() -> None:
    centring = erased_by_centring([0.25, 0.25, 0.25], ["a", "a", "b"])
    assert (centring.total_variance, centring.erased_share, centring.num_constant_groups) == (0.0, 1.0, 2)


@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from("abc")), min_size=1, max_size=12))
def test_the_variance_within_groups_is_that_of_centred_rewards(rows: list[tuple[float, str]]) -> None:
    values, keys = [value for value, _ in rows] * 2, [key for _, key in rows] * 2  # twice: no group of one
    centred = group_relative(values, keys, baseline="mean", scale="none")
    centring = erased_by_centring(values, keys)
    assert centring.within_variance == pytest.approx(sum(value**2 for value in centred) / len(values), abs=1e-12)
    assert 0 <= centring.erased_share <= 1


def test_weights_are_credits_by_size_over_their_mean() -> None:
    assert credit_weights({"a": 0.5, "b": -0.25, "c": 0.0}, limit=4.0) == {"a": 2.0, "b": 1.0, "c": 0.25}
    assert credit_weights({"a": 0.9, "b": 0.05, "c": 0.05}, limit=2.0) == {"a": 2.0, "b": 0.5, "c": 0.5}


def test_without_any_credit_all_weigh_the_same() -> None:
    assert credit_weights({"a": 0.0, "b": -0.0}, limit=2.0) == {"a": 1.0, "b": 1.0}
    assert credit_weights({}, limit=2.0) == {}


def test_a_limit_below_one_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match=r"limit=0\.5"):
        credit_weights({"a": 1.0}, limit=0.5)


@given(CREDITS, st.floats(1, 100))
def test_weights_are_bounded_and_blind_to_signs_and_names(phi: dict[str, float], limit: float) -> None:
    weights = credit_weights(phi, limit=limit)
    assert all(1 / limit <= weight <= limit for weight in weights.values())
    assert credit_weights({agent: -credit for agent, credit in phi.items()}, limit=limit) == weights
    renamed = credit_weights({agent.upper(): phi[agent] for agent in reversed(phi)}, limit=limit)
    assert renamed == {agent.upper(): weight for agent, weight in weights.items()}


@given(CREDITS)
def test_unlimited_weights_have_mean_one(phi: dict[str, float]) -> None:
    weights = credit_weights(phi, limit=1e300)
    assert sum(weights.values()) == pytest.approx(len(phi))


@pytest.mark.parametrize(
    ("advantage", "phi", "weight", "expected"),
    [
        (0.5, 0.25, 2.0, 1.0),
        (-0.5, 0.25, 2.0, -1.0),
        (0.5, -0.25, 2.0, 0.5),  # not amplified
        (-0.5, -0.25, 2.0, -1.0),
        (0.5, -0.25, 0.5, 0.25),  # damped all the same
        (-0.5, -0.25, 0.5, -0.25),
        (0.5, 0.0, 2.0, 1.0),
    ],
)
def test_praise_of_an_agent_that_harms_the_team_is_not_amplified(
    advantage: float, phi: float, weight: float, expected: float
) -> None:
    assert guarded(advantage, phi, weight) == expected


@given(st.floats(-5, 5), st.floats(-1, 1), st.floats(0.01, 100))
def test_a_weight_never_flips_an_advantage(advantage: float, phi: float, weight: float) -> None:
    weighted = guarded(advantage, phi, weight)
    assert (weighted > 0) == (advantage > 0) or abs(advantage) < 1e-300  # which may round to 0
    assert weighted * advantage >= 0


def test_a_negative_weight_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="would flip the sign"):
        guarded(0.5, -0.25, -1.0)
