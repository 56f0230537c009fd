"""Losses of preference pairs from sums of log-probs. Legend: P pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["sigmoid", "hinge", "ipo_sum", "ipo_mean", "robust", "simpo", "orpo", "sft"]

REFERENCE_FREE: frozenset[Kind] = frozenset({"simpo", "orpo", "sft"})
"""Kinds whose loss does not read the reference: without another kind in the list its forward pass can be saved."""
ODDS_LIMIT = 1e-6  # -mean log-prob of ORPO is at least this: the odds of probability 1 are infinite


@dataclass(frozen=True, kw_only=True)
class Completions:
    """One side of the pairs: sums of log-probs over the completion's tokens, and how many those are (at least 1)."""

    policy_P: Tensor
    reference_P: Tensor
    """Zeros for a reference-free run."""
    length_P: Tensor


def preference_loss(
    chosen: Completions,
    rejected: Completions,
    *,
    losses: Sequence[tuple[Kind, float]],
    beta: float,
    label_smoothing: float,
    gamma: float,
    num_pairs: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of `losses`, summed over pairs, over the global `num_pairs`; metrics of each pair, named as in TRL.

    With D = beta * (policy - reference of chosen, minus that of rejected), m the mean log-prob of a token, e = label_smoothing:
    - sigmoid: -(1 - e) log sigmoid(D) - e log sigmoid(-D) (arXiv 2305.18290, eq. 7; e: cDPO).
    - hinge: max(0, 1 - D) (SLiC, arXiv 2305.10425).
    - ipo_sum: (D / beta - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17); ipo_mean: log-ratios over the length, as in TRL.
    - robust: (-(1 - e) log sigmoid(D) + e log sigmoid(-D)) / (1 - 2e), e < 1/2 (arXiv 2403.00409).
    - simpo: as sigmoid with beta * (m_chosen - m_rejected) - gamma for D (arXiv 2405.14734, eq. 6).
    - orpo: -log sigmoid(log odds(m_chosen) - log odds(m_rejected)) (arXiv 2403.07691, eq. 7). Its lambda is the weight, its SFT
      term is sft: losses = [("sft", 1), ("orpo", lambda)].
    - sft: -m_chosen, a mean of means over pairs as in ORPO and RPO (TRL's is the mean over tokens).
    """
    chosen_P, rejected_P = chosen.policy_P - chosen.reference_P, rejected.policy_P - rejected.reference_P
    total_P = torch.zeros_like(chosen_P)
    for kind, weight in losses:
        total_P = total_P + weight * _pair_loss(kind, chosen, rejected, beta, label_smoothing, gamma)
    chosen_P, rejected_P = beta * chosen_P.detach(), beta * rejected_P.detach()
    return total_P.sum() / num_pairs, {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
        "rewards/margins": chosen_P - rejected_P,
        "logps/chosen": chosen.policy_P.detach(),
        "logps/rejected": rejected.policy_P.detach(),
    }


def _pair_loss(kind: Kind, chosen: Completions, rejected: Completions, beta: float, smoothing: float, gamma: float) -> Tensor:
    chosen_P, rejected_P = chosen.policy_P - chosen.reference_P, rejected.policy_P - rejected.reference_P
    delta_P = chosen_P - rejected_P
    mean_P, rejected_mean_P = chosen.policy_P / chosen.length_P, rejected.policy_P / rejected.length_P
    if kind == "sigmoid":
        return _smoothed(beta * delta_P, smoothing)
    if kind == "hinge":
        return F.relu(1 - beta * delta_P)
    if kind == "ipo_sum":
        return (delta_P - 1 / (2 * beta)).square()
    if kind == "ipo_mean":
        return (chosen_P / chosen.length_P - rejected_P / rejected.length_P - 1 / (2 * beta)).square()
    if kind == "robust":
        return _smoothed(beta * delta_P, -smoothing / (1 - 2 * smoothing))
    if kind == "simpo":
        return _smoothed(beta * (mean_P - rejected_mean_P) - gamma, smoothing)
    if kind == "orpo":
        return -F.logsigmoid(_log_odds(mean_P) - _log_odds(rejected_mean_P))
    return -mean_P


def _smoothed(logit_P: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(logit_P) - smoothing * F.logsigmoid(-logit_P)


def _log_odds(mean_P: Tensor) -> Tensor:
    bounded_P = mean_P.clamp(max=-ODDS_LIMIT)
    return bounded_P - (-bounded_P.expm1()).log()
