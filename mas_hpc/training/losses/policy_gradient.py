"""Policy-gradient losses. Legend: N trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # clamped before exp: inf * 0 would put NaN into the gradient


def clipped_policy_loss(
    logprob_N: Tensor, behavior_logprob_N: Tensor, advantage_N: Tensor, *, num_tokens: int, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """PPO surrogate (arXiv 1707.06347, eq. 7) with separate bounds (DAPO, arXiv 2503.14476), summed over tokens.

    Returns the sum divided by the global `num_tokens`, and sums over tokens of: ratio, clipped (0 or 1),
    kl (k3 estimate of behaviour to current policy).
    """
    log_ratio_N = (logprob_N - behavior_logprob_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_N = log_ratio_N.exp()
    unclipped_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N
    loss = -torch.minimum(unclipped_N, clipped_N).sum() / num_tokens
    with torch.no_grad():
        sums = {
            "ratio": ratio_N.sum(),
            "clip_ratio": (clipped_N < unclipped_N).sum(),
            "behavior_kl": (ratio_N - 1 - log_ratio_N).sum(),
        }
    return loss, sums
