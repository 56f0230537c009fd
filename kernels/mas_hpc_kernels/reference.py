"""The operation in plain torch, with all logits at once: the oracle of every faster version.

Legend: N targets, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mas_hpc_kernels.operation import NEGLIGIBLE, PLAIN, LogitRule


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    need_entropy: bool = True,
    entropy_gradient: bool = False,
    rule: LogitRule = PLAIN,
) -> tuple[Tensor, Tensor | None]:
    """As mas_hpc_kernels.linear_logprob, for a whole vocabulary."""
    assert rule.shard is None, "the oracle sees the whole vocabulary"
    logits_NV = hidden_ND @ weight_VD.T
    if rule.bias_V is not None:
        logits_NV = logits_NV + rule.bias_V
    if rule.softcap:
        logits_NV = rule.softcap * torch.tanh(logits_NV / rule.softcap)
    logprob_NV = (logits_NV / temperature).log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    logprob_N = logprob_NV.gather(1, target_N[:, None])[:, 0]
    if not need_entropy:
        return logprob_N, None
    if not entropy_gradient:
        logprob_NV = logprob_NV.detach()
    return logprob_N, -(logprob_NV.exp() * logprob_NV.clamp(min=NEGLIGIBLE)).sum(-1)
