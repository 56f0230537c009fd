"""Log-probabilities of chosen tokens under a linear head, a chunk of targets at a time: logits never exist as a whole.

A frozen head keeps d logprob / d hidden = (W[target] - softmax(W h) @ W) / temperature from the forward, so that its
backward is one product per row. A trained head recomputes each chunk in the backward.
Legend: N targets, V vocabulary, D hidden, C targets of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 256 * 49152
MIN_CHUNK_ROWS = 128  # below this the GEMMs lose more than the memory is worth


class _Options(NamedTuple):
    inverse_temperature: float
    need_entropy: bool
    chunk_rows: int


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    need_entropy: bool = True,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return each target's log-probability and each row's entropy under softmax(hidden @ weight.T / temperature).

    Natural logarithms, [N], in float32 or, for float64 inputs, float64. The log-probability is differentiable in hidden
    and, unless it is frozen, weight; the entropy is a metric and carries no gradient (None unless needed).
    `chunk_rows` bounds the logits alive at once to [chunk_rows, V]; by default 256 rows at V = 49152, more at less.
    """
    assert temperature > 0, "greedy decoding is scored at temperature 1"
    rows = chunk_rows or max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // weight_VD.shape[0])
    options = _Options(1.0 / temperature, need_entropy, rows)
    if not torch.is_grad_enabled() or not (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _forward(hidden_ND, weight_VD, target_N, options, need_rows=False)[:2]
    head = _TrainedHead if weight_VD.requires_grad else _FrozenHead
    return head.apply(hidden_ND, weight_VD, target_N, options)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, options: _Options) -> Any:
        logprob_N, entropy_N, gradient_ND = _forward(hidden_ND, weight_VD, target_N, options, need_rows=True)
        ctx.save_for_backward(gradient_ND)
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> Any:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_N[:, None].to(gradient_ND.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, options: _Options) -> Any:
        logprob_N, entropy_N, _ = _forward(hidden_ND, weight_VD, target_N, options, need_rows=False)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N)
        ctx.options = options
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> Any:
        hidden_ND, weight_VD, target_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype)
        for chunk, grad_CV, _ in _logprob_chunks(hidden_ND, weight_VD, ctx.options):
            scale_C1 = grad_N[chunk, None] * ctx.options.inverse_temperature
            grad_CV.exp_().mul_(-scale_C1).scatter_add_(1, target_N[chunk, None], scale_C1)
            torch.mm(grad_CV.to(weight_VD.dtype), weight_VD, out=grad_hidden_ND[chunk])
            grad_weight_VD.addmm_(grad_CV.T, hidden_ND[chunk].to(grad_CV.dtype))
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None


def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, options: _Options, *, need_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return log-probabilities [N], entropies [N] or None, and d logprob / d hidden [N, D], empty unless needed."""
    logprob_N = torch.empty_like(hidden_ND[:, 0], dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    entropy_N = torch.empty_like(logprob_N) if options.need_entropy else None
    row_ND = torch.empty_like(hidden_ND) if need_rows else hidden_ND[:0]
    for chunk, logprob_CV, scratch_CV in _logprob_chunks(hidden_ND, weight_VD, options):
        logprob_N[chunk] = logprob_CV.gather(1, target_N[chunk, None])[:, 0]
        if options.need_entropy or need_rows:
            torch.exp(logprob_CV, out=scratch_CV)
        if need_rows:
            torch.sub(weight_VD[target_N[chunk]], scratch_CV @ weight_VD, out=row_ND[chunk])
            row_ND[chunk] *= options.inverse_temperature
        if entropy_N is not None:
            entropy_N[chunk] = -logprob_CV.mul_(scratch_CV).sum(-1)
    return logprob_N, entropy_N, row_ND


def _logprob_chunks(hidden_ND: Tensor, weight_VD: Tensor, options: _Options) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, their log-softmax, scratch of the same shape in the dtype of the inputs).

    The caller may overwrite both buffers; they are reused, because fresh ones cost 15-25% in page faults.
    """
    buffer_CV = hidden_ND.new_empty(min(options.chunk_rows, len(hidden_ND)), len(weight_VD))
    result_CV = torch.empty_like(buffer_CV, dtype=torch.promote_types(buffer_CV.dtype, torch.float32))
    for start in range(0, len(hidden_ND), options.chunk_rows):
        chunk = slice(start, min(start + options.chunk_rows, len(hidden_ND)))
        logits_CV, logprob_CV = buffer_CV[: chunk.stop - start], result_CV[: chunk.stop - start]
        torch.addmm(logits_CV, hidden_ND[chunk], weight_VD.T, beta=0, alpha=options.inverse_temperature, out=logits_CV)
        torch.log_softmax(logits_CV, -1, dtype=logprob_CV.dtype, out=logprob_CV)
        yield chunk, logprob_CV, logits_CV
