"""Rewards before credit: the length penalty, and where rewards land among the tokens. N tokens of a trajectory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to max_length - buffer tokens, then linear to -1."""
    excess = length - (max_length - buffer)
    if excess <= 0:
        return 0.0
    return -min(1.0, excess / buffer) if buffer else -1.0


def token_rewards(
    mask_N: NDArray[np.bool_],
    *,
    outcome: float,
    kl_N: NDArray[np.float64] | None = None,
    kl_coefficient: float = 0.0,
    process: Mapping[int, float] | None = None,
) -> NDArray[np.float64]:
    """Reward of every token [N], float64: 0 where mask is False (prompts, observations), else -kl_coefficient * kl.

    The outcome is added to the last token of the policy, whether that is an EOS or where a truncated sample was cut: no EOS
    is invented, so a penalty for its absence belongs in `outcome`. `process` adds rewards by offset among the N tokens.
    """
    assert mask_N.dtype == bool, f"a mask of {mask_N.dtype} would be read as indices"
    assert mask_N.any(), "no token of the policy to reward"
    assert kl_N is not None or not kl_coefficient, "a KL penalty needs kl_N"
    reward_N = np.zeros(mask_N.shape)
    if kl_N is not None:
        reward_N[mask_N] = -kl_coefficient * kl_N[mask_N]
    for offset, reward in (process or {}).items():
        assert 0 <= offset < len(mask_N) and mask_N[offset], f"process reward at {offset}: not a token of the policy"
        reward_N[offset] += reward
    reward_N[np.flatnonzero(mask_N)[-1]] += outcome
    return reward_N
