"""Losses of reward models: of pairs, of outcomes and of steps. Legend: P pairs, N scored items."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, num_pairs: int, margin_P: Tensor | None = None, center_coefficient: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)^2, summed over pairs, over global `num_pairs`.

    Margin: Llama 2 (arXiv 2307.09288, eq. 2); centring, which fixes the free constant: arXiv 2312.09244, eq. 2.
    Metrics of each pair; `accuracy` is 1 where chosen > rejected: a tie is not right.
    """
    difference_P = chosen_P - rejected_P
    loss_P = -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P)
    loss_P = loss_P + center_coefficient * (chosen_P + rejected_P).square()
    return loss_P.sum() / num_pairs, {
        "accuracy": (difference_P > 0).to(chosen_P.dtype),
        "rewards/chosen": chosen_P.detach(),
        "rewards/rejected": rejected_P.detach(),
        "rewards/margins": difference_P.detach(),
    }


def binary_loss(score_N: Tensor, label_N: Tensor, *, num_items: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of sigmoid(score) with labels in [0, 1], summed, over the global `num_items`; accuracy of each item.

    For outcomes (arXiv 2110.14168) and for steps (arXiv 2305.20050; soft labels: 2312.08935). It equals cross-entropy over the
    classes (-, +) with the logits (0, score).
    """
    loss = F.binary_cross_entropy_with_logits(score_N, label_N.to(score_N.dtype), reduction="sum") / num_items
    return loss, {"accuracy": ((score_N > 0) == (label_N > 0.5)).to(score_N.dtype)}
