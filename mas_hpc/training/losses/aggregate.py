"""From losses of tokens to the loss of a batch. Legend: N trained tokens, S samples."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant", "sequence_sum"]


def segment_sum(value_N: Tensor, sample_N: Tensor, num_samples: int) -> Tensor:
    """Sum of each sample's tokens, [S] with S = `num_samples`; 0 for a sample without tokens. Differentiable."""
    return value_N.new_zeros(num_samples).index_add(0, sample_N, value_N)


def segment_mean(value_N: Tensor, sample_N: Tensor, num_samples: int) -> Tensor:
    """Mean of each sample's tokens, [S]; 0 for a sample without tokens. Differentiable."""
    length_S = segment_sum(value_N.new_ones(len(value_N)), sample_N, num_samples)
    return segment_sum(value_N, sample_N, num_samples) / length_S.clamp(min=1)


def aggregate(
    loss_N: Tensor,
    sample_N: Tensor,
    num_local_samples: int,
    *,
    mode: Aggregation,
    num_tokens: int,
    num_samples: int,
    max_length: int | None = None,
) -> Tensor:
    """This part's share of the loss of the whole batch, a scalar: the shares of micro-batches and ranks add up to it.

    sample_N is the token's row among the `num_local_samples` of this part; all trained tokens of a sample are in one part.
    `num_tokens` and `num_samples` count the whole batch; samples without a trained token are not counted.

    - token_mean: sum / num_tokens (DAPO, arXiv 2503.14476, eq. 8; TRL's "dapo").
    - sequence_mean: mean over samples of the mean over tokens (GRPO, arXiv 2402.03300, eq. 3; GSPO).
    - constant: sum / (num_samples * max_length) (Dr. GRPO, arXiv 2503.20783): `max_length` is a constant of the run in tokens,
      never the longest sample of the batch, and needed in this mode only.
    - sequence_sum: mean over samples of the sum over tokens (REINFORCE).
    """
    if mode == "token_mean":
        return loss_N.sum() / num_tokens
    if mode == "sequence_mean":
        return segment_mean(loss_N, sample_N, num_local_samples).sum() / num_samples
    if mode == "sequence_sum":
        return loss_N.sum() / num_samples
    assert max_length is not None
    return loss_N.sum() / (num_samples * max_length)
