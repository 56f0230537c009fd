"""KTO: completions that are judged alone, not in pairs. Legend: S samples."""

from __future__ import annotations

import torch
from torch import Tensor


def kto_loss(
    log_ratio_S: Tensor,
    desirable_S: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    num_samples: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """w * (1 - sigmoid(+-beta * (log_ratio - z))), + for desirable, summed, over the global `num_samples`.

    arXiv 2402.01306, eq. 8. log_ratio_S is log policy - log reference summed over the completion; desirable_S is bool.
    z = max(0, kl), detached: the KL to the reference over ALL ranks, e.g. the mean log-ratio of mismatched completions.
    Metrics: rewards of each desirable (chosen) and undesirable (rejected) sample, empty where there is none, and z.
    """
    zero_point = kl.detach().clamp(min=0)
    reward_S = beta * (log_ratio_S - zero_point)
    loss_S = torch.where(
        desirable_S, desirable_weight * torch.sigmoid(-reward_S), undesirable_weight * torch.sigmoid(reward_S)
    )  # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits
    rewards_S = beta * log_ratio_S.detach()
    return loss_S.sum() / num_samples, {
        "rewards/chosen": rewards_S[desirable_S],
        "rewards/rejected": rewards_S[~desirable_S],
        "kl": zero_point.reshape(1),
    }
