"""Group baselines against the field's golden numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.credit_assignment.group_relative import group_relative

REWARDS = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_g19_standardised_advantages() -> None:
    advantages = group_relative(REWARDS, ["q"] * 8, normalize="std")
    assert advantages[0] == pytest.approx(1.207381, abs=1e-6)
    assert advantages[-1] == pytest.approx(-0.724429, abs=1e-6)


def test_g19_mean_only_advantages() -> None:
    assert group_relative(REWARDS, ["q"] * 8, normalize="mean") == pytest.approx([0.625] * 3 + [-0.375] * 5)


def test_a_group_without_variance_gets_exactly_zero() -> None:
    # G21: a third is not representable, so mean and rewards could differ in the last bit
    assert group_relative([1 / 3] * 7, ["q"] * 7, normalize="std") == [0.0] * 7


def test_groups_do_not_mix() -> None:
    rewards, keys = [1.0, 5.0, 0.0, 7.0], ["a", "b", "a", "b"]
    assert group_relative(rewards, keys, normalize="mean") == [0.5, -1.0, -0.5, 1.0]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 members, found 1"):
        group_relative([1.0], ["q"], normalize="std")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5))
def test_advantages_sum_to_zero_and_ignore_a_constant(rewards: list[float], constant: float) -> None:
    keys = [0] * len(rewards)
    shifted = group_relative([reward + constant for reward in rewards], keys, normalize="mean")
    assert sum(shifted) == pytest.approx(0.0, abs=1e-9)
    assert shifted == pytest.approx(group_relative(rewards, keys, normalize="mean"), abs=1e-9)
