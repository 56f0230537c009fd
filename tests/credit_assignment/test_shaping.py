"""The length penalty, and where rewards land."""

from __future__ import annotations

import numpy as np
import pytest

from mas_hpc.credit_assignment.gae import gae
from mas_hpc.credit_assignment.shaping import overlong_penalty, token_rewards

ALL = np.ones(3, dtype=bool)


@pytest.mark.parametrize(("length", "expected"), [(3900, 0.0), (4000, 0.0), (4500, -0.5), (5000, -1.0), (6000, -1.0)])
def test_g38_overlong_penalty(length: int, expected: float) -> None:
    assert overlong_penalty(length, max_length=5000, buffer=1000) == expected


def test_without_a_buffer_the_penalty_is_a_step() -> None:
    assert [overlong_penalty(length, max_length=10, buffer=0) for length in (9, 10, 11)] == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(("mask", "expected"), [([1, 1, 1], [0, 0, 2]), ([1, 0, 1], [0, 0, 2]), ([1, 1, 0], [0, 2, 0])])
def test_g27_the_outcome_lands_on_the_last_policy_token(mask: list[int], expected: list[float]) -> None:
    # nothing tells a truncated sample from a finished one: there is no EOS to look for
    assert token_rewards(np.array(mask, dtype=bool), outcome=2.0).tolist() == expected


def test_kl_is_subtracted_from_every_policy_token_only() -> None:
    mask_N = np.array([True, False, True, True])
    reward_N = token_rewards(mask_N, outcome=1.0, kl_N=np.array([1.0, np.nan, -2.0, 3.0]), kl_coefficient=0.1)
    assert reward_N == pytest.approx([-0.1, 0.0, 0.2, 0.7])


def test_process_rewards_land_at_their_offsets_and_add_to_the_outcome() -> None:
    assert token_rewards(ALL, outcome=1.0, process={0: 0.5, 2: -0.25}).tolist() == [0.5, 0.0, 0.75]


@pytest.mark.parametrize("offset", [-1, 1, 3])
def test_a_process_reward_outside_the_policy_tokens_is_a_programming_error(offset: int) -> None:
    with pytest.raises(AssertionError, match="not a token of the policy"):
        token_rewards(np.array([True, False, True]), outcome=0.0, process={offset: 1.0})


def test_a_penalty_without_kl_or_a_reward_without_tokens_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="needs kl_N"):
        token_rewards(ALL, outcome=1.0, kl_coefficient=0.1)
    with pytest.raises(AssertionError, match="no token"):
        token_rewards(~ALL, outcome=1.0)


def test_with_gamma_and_lambda_one_the_advantage_is_outcome_minus_kl_minus_value() -> None:
    kl_N, value_N = np.array([0.2, 0.1, 0.4]), np.array([0.3, 0.5, 0.6])
    reward_N = token_rewards(ALL, outcome=1.0, kl_N=kl_N, kl_coefficient=0.5)
    advantage_N, return_N = gae(reward_N, value_N, ALL, gamma=1.0, lam=1.0)
    assert return_N == pytest.approx([0.65, 0.75, 0.8])
    assert advantage_N == pytest.approx(return_N - value_N)
