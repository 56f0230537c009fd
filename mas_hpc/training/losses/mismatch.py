"""Correction for an engine that does not sample from quite the policy that is trained. Legend: N trained tokens, S samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mas_hpc.training.losses.aggregate import segment_sum

Level = Literal["token", "sequence"]
Action = Literal["truncate", "mask"]


@torch.no_grad()
def mismatch_weight(
    old_logprob_N: Tensor,
    behavior_logprob_N: Tensor,
    sample_N: Tensor,
    num_local_samples: int,
    *,
    level: Level,
    action: Action,
    cap: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Importance weight [N], no gradient, of the trainer's policy before the update over the engine's.

    With d = old - behavior, 0 where the engine gave no log-prob (nan):
    - level: the token's exp(d), or for each token of a sequence exp of the SUM of d over it, as in TRL (OpenRLHF and NeMo-RL
      take the mean). The sum's spread grows with the length: long sequences are cut first.
    - action above `cap`: truncate to it (TIS, fengyao.notion.site/off-policy-rl) or mask, weight 0.
    Metrics, named as in TRL: the weight that is returned, of each token; |d| of each token that has a behaviour log-prob.
    """
    difference_N = old_logprob_N - behavior_logprob_N
    log_weight_N = torch.where(difference_N.isnan(), 0.0, difference_N)
    if level == "sequence":
        log_weight_N = segment_sum(log_weight_N, sample_N, num_local_samples)[sample_N]
    weight_N = log_weight_N.exp()
    weight_N = weight_N.clamp(max=cap) if action == "truncate" else torch.where(weight_N > cap, 0.0, weight_N)
    distance = difference_N[~difference_N.isnan()].abs()
    return weight_N, {
        "sampling/importance_sampling_ratio/mean": weight_N,
        "sampling/importance_sampling_ratio/min": weight_N,
        "sampling/importance_sampling_ratio/max": weight_N,
        "sampling/sampling_logp_difference/mean": distance,
        "sampling/sampling_logp_difference/max": distance,
    }
