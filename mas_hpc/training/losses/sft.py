"""Supervised fine-tuning. Legend: N trained tokens."""

from __future__ import annotations

from torch import Tensor


def nll_loss(logprob_N: Tensor, *, num_tokens: int) -> Tensor:
    """Negative log-likelihood summed over tokens, over the global number of trained tokens. Returns a scalar."""
    return -logprob_N.sum() / num_tokens
