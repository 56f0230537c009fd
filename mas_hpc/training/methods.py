"""Methods as rows of a table: kind -> loss. The learner never learns a method's name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mas_hpc.config import ATGRPOConfig, SFTConfig
from mas_hpc.data.token_tree import TokenTree
from mas_hpc.training.losses.policy_gradient import clipped_policy_loss
from mas_hpc.training.losses.sft import nll_loss


class Loss(Protocol):
    """Log-probs of the trained tokens of one forest -> (scalar to backpropagate, sums over tokens to report)."""

    def __call__(self, logprob_N: Tensor, tree: TokenTree, *, num_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`num_tokens` is the global denominator: all forests and ranks divide by the same number."""
        ...


def loss_of(config: SFTConfig | ATGRPOConfig) -> Loss:
    """The loss of a method."""
    if isinstance(config, SFTConfig):
        return lambda logprob_N, tree, *, num_tokens: (nll_loss(logprob_N, num_tokens=num_tokens), {})
    return lambda logprob_N, tree, *, num_tokens: clipped_policy_loss(
        logprob_N, tree.behavior_logprob_N, tree.advantage_N,
        num_tokens=num_tokens, clip_low=config.clip_low, clip_high=config.clip_high,
    )  # fmt: skip
