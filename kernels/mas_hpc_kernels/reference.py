"""The operation in plain torch, with all logits at once: the oracle of every faster version.

Legend: N targets, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, temperature: float = 1.0, need_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return each target's log-probability and each row's entropy under softmax(hidden @ weight.T / temperature).

    Differentiable in the log-probability; the entropy is a metric and carries no gradient (None unless needed).
    """
    logits_NV = hidden_ND @ weight_VD.T / temperature
    logprob_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    entropy_N = -(logprob_NV.detach().exp() * logprob_NV.detach()).sum(-1) if need_entropy else None
    return logprob_NV.gather(1, target_N[:, None])[:, 0], entropy_N
