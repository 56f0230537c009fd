"""Loss of the critic. Legend: N trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, *, num_tokens: int, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * max((V - R)^2, (V_clipped - R)^2) summed over tokens, over the global `num_tokens`; metrics of each token.

    V_clipped is V held within `clip` of the value before the update (openai/baselines, ppo2); None: 0.5 * (V - R)^2.
    """
    error_N = (value_N - return_N).square()
    worse_N = error_N
    if clip is not None:
        clipped_N = value_N.clamp(old_value_N - clip, old_value_N + clip)
        worse_N = torch.maximum(error_N, (clipped_N - return_N).square())
    return 0.5 * worse_N.sum() / num_tokens, {
        "value/clip_ratio": (worse_N > error_N).to(value_N.dtype),
        "value/mean": value_N.detach(),
        "value/error": error_N.detach(),
    }
