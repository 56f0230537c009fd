"""Policy-gradient losses of each token. Legend: N trained tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mas_hpc.training.losses.aggregate import segment_mean
from mas_hpc.training.losses.kl import kl_estimate

Ratio = Literal["token", "sequence", "cispo"]

LOG_RATIO_LIMIT = 20.0  # before exp: inf * 0 would put NaN into the gradient


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The ratio's bounds 1 - low and 1 + high: both RELATIVE to 1, for CISPO too (TRL's epsilon_high of CISPO is absolute)."""

    low: float
    high: float
    dual: float | None = None
    """c > 1: where the advantage A is negative, the loss is at most c * |A| (arXiv 1912.09729). None: no such bound."""


def policy_loss(
    logprob_N: Tensor,
    old_logprob_N: Tensor,
    advantage_N: Tensor,
    sample_N: Tensor,
    num_local_samples: int,
    *,
    ratio: Ratio,
    clip: Clip,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token [N], for the caller to add to and to aggregate, and metrics of each token. A is the advantage.

    With `old_logprob_N = logprob_N.detach()` the ratio is exactly 1 and the gradient that of -A * logprob.
    - token: PPO, -min(r A, clamp(r) A), r = pi / pi_old of the token (arXiv 1707.06347, eq. 7; separate bounds: 2503.14476).
    - sequence: GSPO-token (arXiv 2507.18071, eq. 13): r = sg[s] * pi / sg[pi], s = exp(mean over the sequence of
      log pi - log pi_old). Aggregated by `sequence_mean`, and A the same for the whole sequence, it is GSPO (eq. 5).
    - cispo: -sg[clamp(r)] A log pi, r of the token (arXiv 2506.13585, eq. 4).
    `weight_N` (see mismatch.py) multiplies the loss outside the clip; it carries no gradient.
    Gradient 0 where |log r| > 20 (but for cispo). All samples' tokens are here: a sequence is not split.
    """
    log_ratio_N = logprob_N - old_logprob_N
    if ratio == "sequence":
        mean_S = segment_mean(log_ratio_N.detach(), sample_N, num_local_samples)
        log_ratio_N = mean_S[sample_N] + (logprob_N - logprob_N.detach())
    ratio_N = log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    bounded_N = ratio_N.clamp(1 - clip.low, 1 + clip.high)
    if ratio == "cispo":
        assert clip.dual is None
        loss_N = -bounded_N.detach() * advantage_N * logprob_N
    else:
        loss_N = -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
        if clip.dual is not None:
            loss_N = torch.where(advantage_N < 0, torch.minimum(loss_N, -clip.dual * advantage_N), loss_N)
    if weight_N is not None:
        loss_N = loss_N * weight_N.detach()
    return loss_N, _metrics(ratio_N.detach(), logprob_N.detach(), old_logprob_N.detach(), advantage_N, clip)


def _metrics(ratio_N: Tensor, logprob_N: Tensor, old_logprob_N: Tensor, advantage_N: Tensor, clip: Clip) -> dict[str, Tensor]:
    low_N = ((ratio_N < 1 - clip.low) & (advantage_N < 0)).to(ratio_N.dtype)
    high_N = ((ratio_N > 1 + clip.high) & (advantage_N > 0)).to(ratio_N.dtype)
    return {
        "clip_ratio/low_mean": low_N,
        "clip_ratio/high_mean": high_N,
        "clip_ratio/region_mean": low_N + high_N,
        "ratio/mean": ratio_N,
        "ratio/max": ratio_N,
        "approx_kl": kl_estimate(old_logprob_N, logprob_N, estimator="k3"),  # of the old policy to this one
    }
