"""Baselines against the field's golden numbers and slow references."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.credit_assignment.group_relative import group_relative, informative, rae, whiten

REWARDS = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
KINDS = [(baseline, scale) for baseline in ("mean", "leave_one_out") for scale in ("group", "batch", "none")]


def naive(rewards: list[float], keys: list[str], baseline: str, scale: str) -> list[float]:
    """Member by member, from the definitions."""
    centred = []
    for i, reward in enumerate(rewards):
        peers = [r for j, r in enumerate(rewards) if keys[j] == keys[i] and (baseline == "mean" or j != i)]
        centred.append(reward - sum(peers) / len(peers))
    if scale == "none":
        return centred
    if scale == "batch":
        return [value / (np.std(centred, ddof=1) + 1e-4) for value in centred]
    group = {key: [r for r, k in zip(rewards, keys, strict=True) if k == key] for key in keys}
    return [value / (np.std(group[key], ddof=1) + 1e-4) for value, key in zip(centred, keys, strict=True)]


def test_g19_grpo_advantages() -> None:
    advantages = group_relative(REWARDS, ["q"] * 8, baseline="mean", scale="group")
    assert advantages[0] == pytest.approx(1.207381, abs=1e-6)
    assert advantages[-1] == pytest.approx(-0.724429, abs=1e-6)


def test_g19_dr_grpo_advantages() -> None:
    advantages = group_relative(REWARDS, ["q"] * 8, baseline="mean", scale="none")
    assert advantages == pytest.approx([0.625] * 3 + [-0.375] * 5)


def test_g20_rloo_advantages() -> None:
    advantages = group_relative(REWARDS, ["q"] * 8, baseline="leave_one_out", scale="none")
    assert advantages == pytest.approx([0.714286] * 3 + [-0.428571] * 5, abs=1e-6)


@pytest.mark.parametrize(("baseline", "scale"), KINDS)
def test_g19_g21_a_group_without_variance_gets_exactly_zero(baseline: str, scale: str) -> None:
    # a third is not representable, so mean and rewards could differ in the last bit
    rewards, keys = [1 / 3] * 7 + [1.0, 0.0], ["q"] * 7 + ["r"] * 2
    assert group_relative(rewards, keys, baseline=baseline, scale=scale)[:7] == [0.0] * 7
    assert group_relative(rewards[:7], keys[:7], baseline=baseline, scale=scale) == [0.0] * 7


def test_g21_a_large_constant_does_not_cancel_the_variance() -> None:
    rewards = [1e6 + reward for reward in REWARDS]
    advantages = group_relative(rewards, ["q"] * 8, baseline="mean", scale="group")
    assert advantages == pytest.approx([1.207381] * 3 + [-0.724429] * 5, abs=1e-6)


@pytest.mark.parametrize(("baseline", "scale"), KINDS)
@pytest.mark.parametrize("missing", [None, math.nan])
def test_g22_a_missing_reward_counts_nowhere_and_gets_zero(baseline: str, scale: str, missing: float | None) -> None:
    rewards, keys = [1.0, 0.0, 0.5, 2.0, 5.0], ["a", "a", "a", "b", "b"]
    whole = group_relative(rewards, keys, baseline=baseline, scale=scale)
    holed = group_relative([1.0, missing, *rewards[1:], missing], ["a", "a", *keys[1:], "b"], baseline=baseline, scale=scale)
    assert holed == [whole[0], 0.0, *whole[1:], 0.0]


@pytest.mark.parametrize(("baseline", "scale"), KINDS)
def test_g22_the_only_reward_left_of_a_group_gets_zero(baseline: str, scale: str) -> None:
    assert group_relative([7.0, None], ["q", "q"], baseline=baseline, scale=scale) == [0.0, 0.0]
    assert group_relative([None, None], ["q", "q"], baseline=baseline, scale=scale) == [0.0, 0.0]
    rewards, keys = [3.0, 1.0, 7.0, None], ["a", "a", "b", "b"]
    whole = group_relative(rewards[:2], keys[:2], baseline=baseline, scale=scale)
    assert group_relative(rewards, keys, baseline=baseline, scale=scale) == [*whole, 0.0, 0.0]


def test_batch_scale_keeps_the_proportions_between_groups() -> None:
    # centred: .5 -.5 2 -2; squares sum to 8.5, over 3
    rewards, keys = [1.0, 0.0, 5.0, 1.0], ["a", "a", "b", "b"]
    advantages = group_relative(rewards, keys, baseline="mean", scale="batch")
    unit = 1 / ((8.5 / 3) ** 0.5 + 1e-4)
    assert advantages == pytest.approx([0.5 * unit, -0.5 * unit, 2 * unit, -2 * unit], rel=1e-12)


def test_groups_do_not_mix() -> None:
    rewards, keys = [1.0, 5.0, 0.0, 7.0], ["a", "b", "a", "b"]
    assert group_relative(rewards, keys, baseline="mean", scale="none") == [0.5, -1.0, -0.5, 1.0]


def test_g20_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group r: a group baseline needs at least 2 members, found 1"):
        group_relative([1.0, 0.0, 1.0], ["q", "q", "r"], baseline="mean", scale="group")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5))
def test_advantages_sum_to_zero_and_ignore_a_constant(rewards: list[float], constant: float) -> None:
    keys = [0] * len(rewards)
    shifted = group_relative([reward + constant for reward in rewards], keys, baseline="mean", scale="none")
    assert sum(shifted) == pytest.approx(0.0, abs=1e-9)
    assert shifted == pytest.approx(group_relative(rewards, keys, baseline="mean", scale="none"), abs=1e-9)


@pytest.mark.parametrize(("baseline", "scale"), KINDS)
def test_advantages_equal_the_definitions_in_any_order(baseline: str, scale: str) -> None:
    random = Random(0)
    for _ in range(20):
        rows = [(random.choice([0.0, 1.0, random.gauss(0, 3)]), key) for key in "abc" for _ in range(random.randint(2, 6))]
        random.shuffle(rows)
        rewards, keys = [row[0] for row in rows], [row[1] for row in rows]
        advantages = group_relative(rewards, keys, baseline=baseline, scale=scale)
        assert advantages == pytest.approx(naive(rewards, keys, baseline, scale), rel=1e-9, abs=1e-12)
        order = random.sample(range(len(rows)), k=len(rows))
        moved = group_relative([rewards[i] for i in order], [keys[i] for i in order], baseline=baseline, scale=scale)
        assert moved == [advantages[i] for i in order]


def test_informative_groups_have_two_different_rewards() -> None:
    groups = {"mixed": [1.0, 0.0], "right": [1.0, 1.0], "one left": [1.0, None], "failed": [None, math.nan], "none": []}
    assert informative({**groups, "mixed with a hole": [1.0, None, 0.5]}) == {"mixed", "mixed with a hole"}


def test_rae_measures_each_agent_against_its_own_past() -> None:
    advantages, baselines = rae([1.0, -1.0, 1.0, -1.0], ["x", "o", "x", "o"], {"o": -0.5, "idle": 2.0}, decay=0.9)
    assert advantages == pytest.approx([1.0, -0.5, 0.9, -0.45])  # x: 0 -> .1 -> .19; o: -.5 -> -.55 -> -.595
    assert baselines == pytest.approx({"x": 0.19, "o": -0.595, "idle": 2.0})


def test_rae_leaves_the_given_baselines_alone_and_skips_missing_rewards() -> None:
    before = {"x": 0.5}
    advantages, after = rae([None, math.nan, 1.0], ["x", "x", "x"], before, decay=0.5)
    assert (advantages, after, before) == ([0.0, 0.0, 0.5], {"x": 0.75}, {"x": 0.5})


def test_rae_in_two_batches_equals_one() -> None:
    rewards, agents = [0.3, 1.0, -2.0, 0.7], ["x", "y", "x", "y"]
    first, middle = rae(rewards[:1], agents[:1], {}, decay=0.95)
    second, end = rae(rewards[1:], agents[1:], middle, decay=0.95)
    assert ([*first, *second], end) == rae(rewards, agents, {}, decay=0.95)


def test_g23_whitening_is_by_the_sample_deviation() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert whiten(values) == pytest.approx([-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-6)
    assert whiten(values, shift_mean=False) == pytest.approx([1.338105, 2.112702, 2.887298, 3.661895], abs=1e-6)


def test_whitened_values_have_mean_zero_and_deviation_one() -> None:
    whitened = whiten(np.random.default_rng(0).normal(5.0, 3.0, size=1000))
    assert whitened.mean() == pytest.approx(0.0, abs=1e-12)
    assert whitened.std(ddof=1) == pytest.approx(1.0, abs=1e-8)


def test_whitening_is_finite_without_variance() -> None:
    assert whiten(np.full(5, 2.0)).tolist() == [0.0] * 5
    assert whiten(np.array([2.0])).tolist() == [0.0]
    assert whiten(np.array([2.0]), shift_mean=False).tolist() == [2.0]
    assert whiten(np.zeros(0)).size == 0
