"""Per-token advantages and returns of one trajectory. N its tokens, several turns and the observations between them.

Observation tokens (mask False) are skipped: the token before them continues at the token after them, undecayed, as if the
policy's tokens were adjacent. Their entries in the results are 0, their values are never read, and rewards there are refused.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def gae(
    reward_N: Floats, value_N: Floats, mask_N: NDArray[np.bool_], *, gamma: float, lam: float, bootstrap: float = 0.0
) -> tuple[Floats, Floats]:
    """Generalised advantages and value targets [N], float64 (arXiv 1506.02438, eq. 16).

    A_t = sum_l (gamma * lam)^l * delta_{t+l}, with delta_t = r_t + gamma * V_{t+1} - V_t, and return_t = A_t + V_t (take it
    before whitening A). `bootstrap` is the value after the last token: 0 at a true end, V of the state of a truncated one.
    """
    assert value_N.shape == mask_N.shape, f"{value_N.shape} values for a mask of {mask_N.shape}"
    reward = _policy_rewards(reward_N, mask_N)
    value = value_N[mask_N].astype(np.float64)
    delta = reward + gamma * np.append(value, bootstrap)[1:] - value
    advantage = _discounted_sums(delta, gamma * lam)
    return _spread(advantage, mask_N), _spread(advantage + value, mask_N)


def discounted_returns(reward_N: Floats, mask_N: NDArray[np.bool_], gamma: float) -> Floats:
    """Returns [N], float64: G_t = r_t + gamma * G_{t+1} over the policy's tokens (REINFORCE++, arXiv 2501.03262)."""
    return _spread(_discounted_sums(_policy_rewards(reward_N, mask_N), gamma), mask_N)


def _policy_rewards(reward_N: Floats, mask_N: NDArray[np.bool_]) -> Floats:
    assert mask_N.dtype == bool, f"a mask of {mask_N.dtype} would be read as indices"
    assert reward_N.shape == mask_N.shape, f"{reward_N.shape} rewards for a mask of {mask_N.shape}"
    assert not reward_N[~mask_N].any(), "a reward on a token that the policy did not write would be lost"
    return reward_N[mask_N].astype(np.float64)


def _discounted_sums(term: Floats, decay: float) -> Floats:
    backwards = accumulate(term[::-1].tolist(), lambda later, now: now + decay * later)
    return np.array(list(backwards)[::-1], dtype=np.float64)


def _spread(result: Floats, mask_N: NDArray[np.bool_]) -> Floats:
    result_N = np.zeros(mask_N.shape)
    result_N[mask_N] = result
    return result_N
