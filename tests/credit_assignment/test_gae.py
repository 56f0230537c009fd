"""Per-token advantages against golden numbers, the double sum of the paper and the compacted trajectory."""

from __future__ import annotations

import numpy as np
import pytest

from mas_hpc.credit_assignment.gae import discounted_returns, gae


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def mask(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def double_sum(reward: np.ndarray, value: np.ndarray, gamma: float, lam: float, bootstrap: float) -> np.ndarray:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, term by term."""
    after = [*value[1:], bootstrap]
    delta = [reward[t] + gamma * after[t] - value[t] for t in range(len(reward))]
    return array(*(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))))


def random_trajectory(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask_N = rng.random(40) < 0.6
    return rng.normal(size=40) * mask_N, rng.normal(size=40), mask_N


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, [0.46575, 0.385, 0.3]), (0.99, [0.446829, 0.37515, 0.3])])
def test_g24_gae_and_returns(gamma: float, expected: list[float]) -> None:
    value_N = array(0.5, 0.6, 0.7)
    advantage_N, return_N = gae(array(0, 0, 1), value_N, mask(1, 1, 1), gamma=gamma, lam=0.95)
    assert advantage_N == pytest.approx(expected, abs=1e-6)
    assert return_N == pytest.approx(np.array(expected) + value_N, abs=1e-6)


def test_g25_the_masked_tail_is_never_read() -> None:
    advantage_N, return_N = gae(array(0, 1, 0), array(0, 0, 100), mask(1, 1, 0), gamma=1.0, lam=0.95)
    assert advantage_N == pytest.approx([0.95, 1.0, 0.0])
    assert return_N == pytest.approx([0.95, 1.0, 0.0])


def test_g26_observations_are_skipped_without_decay() -> None:
    value_N, mask_N = array(0.5, 0.6, 9, 9, 0.7, 0.8), mask(1, 1, 0, 0, 1, 1)
    advantage_N, return_N = gae(array(0, 0, 0, 0, 0, 1), value_N, mask_N, gamma=1.0, lam=0.95)
    assert advantage_N == pytest.approx([0.456725, 0.3755, 0, 0, 0.29, 0.2], abs=1e-6)
    assert return_N == pytest.approx([0.956725, 0.9755, 0, 0, 0.99, 1.0], abs=1e-6)


def test_g26_returns_do_not_restart_at_an_observation() -> None:
    assert discounted_returns(array(0, 0, 1), mask(1, 0, 1), 0.5).tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_a_masked_trajectory_equals_the_compacted_one(seed: int) -> None:
    reward_N, value_N, mask_N = random_trajectory(seed)
    everything = np.ones(mask_N.sum(), dtype=bool)
    masked = gae(reward_N, value_N, mask_N, gamma=0.97, lam=0.9, bootstrap=0.4)
    compact = gae(reward_N[mask_N], value_N[mask_N], everything, gamma=0.97, lam=0.9, bootstrap=0.4)
    for spread, dense in zip(masked, compact, strict=True):
        assert spread[mask_N].tolist() == dense.tolist()
        assert not spread[~mask_N].any()
    returns_N = discounted_returns(reward_N, mask_N, 0.97)
    assert returns_N[mask_N].tolist() == discounted_returns(reward_N[mask_N], everything, 0.97).tolist()


@pytest.mark.parametrize("bootstrap", [0.0, 1.5])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_double_sum(gamma: float, lam: float, bootstrap: float) -> None:
    reward_N, value_N, _ = random_trajectory(7)
    advantage_N, _ = gae(reward_N, value_N, np.ones(40, dtype=bool), gamma=gamma, lam=lam, bootstrap=bootstrap)
    np.testing.assert_allclose(advantage_N, double_sum(reward_N, value_N, gamma, lam, bootstrap), rtol=0, atol=1e-12)


def test_with_lambda_one_the_return_is_the_discounted_return() -> None:
    reward_N, value_N, mask_N = random_trajectory(3)
    _, return_N = gae(reward_N, value_N, mask_N, gamma=0.9, lam=1.0)
    np.testing.assert_allclose(return_N, discounted_returns(reward_N, mask_N, 0.9), rtol=0, atol=1e-12)


def test_results_are_float64_and_a_trajectory_without_policy_tokens_is_zero() -> None:
    advantage_N, return_N = gae(np.ones(2, dtype=np.float32), np.ones(2, dtype=np.float32), mask(1, 1), gamma=1, lam=1)
    assert (advantage_N.dtype, return_N.dtype) == (np.float64, np.float64)
    advantage_N, return_N = gae(array(0, 0), array(5, 5), mask(0, 0), gamma=1.0, lam=0.95, bootstrap=3.0)
    assert (advantage_N.tolist(), return_N.tolist()) == ([0.0, 0.0], [0.0, 0.0])


def test_a_mask_of_integers_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="read as indices"):
        gae(array(0, 1), array(0, 0), np.array([1, 0]), gamma=1.0, lam=0.95)


def test_a_reward_on_an_observation_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="would be lost"):
        gae(array(0, 1), array(0, 0), mask(1, 0), gamma=1.0, lam=0.95)
    with pytest.raises(AssertionError, match="would be lost"):
        discounted_returns(array(0, 1), mask(1, 0), 1.0)
