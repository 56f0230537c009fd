"""Log-probabilities of chosen tokens under a linear head, a chunk of targets at a time: logits never exist as a whole.

A frozen head keeps d logprob / d hidden = (W[target] - softmax(W h) @ W) / temperature from the forward, so that its
backward is one product per row. A trained head keeps the log-softmax of the first chunks and recomputes the others.
Legend: N targets, V vocabulary, D hidden, C targets of one chunk, K targets whose log-softmax a trained head keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 256 * 49152
MIN_CHUNK_ROWS = 128  # below this the GEMMs lose more than the memory is worth
RETAIN_ELEMENTS = 64 << 20
"""Size of the log-softmax that a trained head keeps for its backward: 256 MiB in float32, 1280 targets at V = 49152."""


class _Options(NamedTuple):
    inverse_temperature: float
    need_entropy: bool
    entropy_gradient: bool
    chunk_rows: int


class _Saved(NamedTuple):
    """What the forward keeps for the backward; empty unless asked for."""

    logprob_ND: Tensor
    """d logprob / d hidden."""
    entropy_ND: Tensor
    """d entropy / d hidden."""
    logprob_KV: Tensor


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    need_entropy: bool = True,
    entropy_gradient: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return each target's log-probability and each row's entropy under softmax(hidden @ weight.T / temperature).

    Natural logarithms, [N], in float32 or, for float64 inputs, float64. The log-probability is differentiable in hidden
    and, unless it is frozen, weight; the entropy (None unless needed) only with `entropy_gradient`, for an entropy bonus.
    `chunk_rows` bounds the logits alive at once to [chunk_rows, V]; by default 256 rows at V = 49152, more at less.
    """
    assert temperature > 0, "greedy decoding is scored at temperature 1"
    assert need_entropy or not entropy_gradient, "the gradient of an entropy that is not needed"
    rows = chunk_rows or max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // weight_VD.shape[0])
    options = _Options(1.0 / temperature, need_entropy, entropy_gradient, rows)
    if not torch.is_grad_enabled() or not (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _forward(hidden_ND, weight_VD, target_N, options)[:2]
    head = _TrainedHead if weight_VD.requires_grad else _FrozenHead
    return head.apply(hidden_ND, weight_VD, target_N, options)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, options: _Options) -> Any:
        logprob_N, entropy_N, saved = _forward(hidden_ND, weight_VD, target_N, options, need_rows=True)
        ctx.save_for_backward(saved.logprob_ND, saved.entropy_ND)
        if entropy_N is not None and not options.entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, entropy_grad_N: Tensor) -> Any:
        logprob_ND, entropy_ND = ctx.saved_tensors
        grad_ND = logprob_ND * grad_N[:, None].to(logprob_ND.dtype)
        if len(entropy_ND):
            grad_ND.addcmul_(entropy_ND, entropy_grad_N[:, None].to(entropy_ND.dtype))
        return grad_ND, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, options: _Options) -> Any:
        kept = len(hidden_ND)
        if kept * len(weight_VD) > RETAIN_ELEMENTS:
            kept = RETAIN_ELEMENTS // len(weight_VD) // options.chunk_rows * options.chunk_rows
        logprob_N, entropy_N, saved = _forward(hidden_ND, weight_VD, target_N, options, keep=kept)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, saved.logprob_KV, entropy_N)
        ctx.options = options
        if entropy_N is not None and not options.entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, entropy_grad_N: Tensor) -> Any:
        hidden_ND, weight_VD, target_N, logprob_KV, entropy_N = ctx.saved_tensors
        options: _Options = ctx.options
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype)
        for chunk, logprob_CV, scratch_CV in _logprob_chunks(hidden_ND, weight_VD, options, logprob_KV, is_known=True):
            # d logprob / d logits = onehot - p; d entropy / d logits = -p (log p + entropy)
            scale_C1 = grad_N[chunk, None] * options.inverse_temperature
            grad_CV = torch.exp(logprob_CV, out=scratch_CV)
            if options.entropy_gradient:
                entropy_scale_C1 = entropy_grad_N[chunk, None] * options.inverse_temperature
                grad_CV.mul_((logprob_CV + entropy_N[chunk, None]).mul_(-entropy_scale_C1).sub_(scale_C1))
            else:
                grad_CV.mul_(-scale_C1)
            grad_CV.scatter_add_(1, target_N[chunk, None], scale_C1)
            torch.mm(grad_CV.to(weight_VD.dtype), weight_VD, out=grad_hidden_ND[chunk])
            grad_weight_VD.addmm_(grad_CV.T, hidden_ND[chunk].to(grad_CV.dtype))
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None


def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, options: _Options, *, need_rows: bool = False, keep: int = 0
) -> tuple[Tensor, Tensor | None, _Saved]:
    """Return log-probabilities [N], entropies [N] or None, and what the backward needs: rows, or the first `keep` softmaxes."""
    logprob_N = torch.empty_like(hidden_ND[:, 0], dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    entropy_N = torch.empty_like(logprob_N) if options.need_entropy else None
    saved = _Saved(
        torch.empty_like(hidden_ND) if need_rows else hidden_ND[:0],
        torch.empty_like(hidden_ND) if need_rows and options.entropy_gradient else hidden_ND[:0],
        logprob_N.new_empty(keep, len(weight_VD)),
    )
    for chunk, logprob_CV, scratch_CV in _logprob_chunks(hidden_ND, weight_VD, options, saved.logprob_KV):
        logprob_N[chunk] = logprob_CV.gather(1, target_N[chunk, None])[:, 0]
        if options.need_entropy or need_rows:
            torch.exp(logprob_CV, out=scratch_CV)
        if need_rows:
            mean_CD = scratch_CV.to(weight_VD.dtype) @ weight_VD
            torch.sub(weight_VD[target_N[chunk]], mean_CD, out=saved.logprob_ND[chunk])
            saved.logprob_ND[chunk] *= options.inverse_temperature
        if entropy_N is not None:
            entropy_N[chunk] = -scratch_CV.mul_(logprob_CV).sum(-1)
        if entropy_N is not None and len(saved.entropy_ND):
            mean_CD.mul_(entropy_N[chunk, None]).addmm_(scratch_CV.to(weight_VD.dtype), weight_VD)
            torch.mul(mean_CD, -options.inverse_temperature, out=saved.entropy_ND[chunk])
    return logprob_N, entropy_N, saved


def _logprob_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, options: _Options, kept_KV: Tensor, *, is_known: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, their log-softmax, scratch of the same shape); the first K are written to `kept_KV`, or read if known.

    The caller may overwrite the scratch; buffers are reused, because fresh ones cost 15-25% in page faults.
    """
    size = min(options.chunk_rows, len(hidden_ND))
    buffer_CV = kept_KV.new_empty(size, len(weight_VD))
    logits_CV = buffer_CV if hidden_ND.dtype == buffer_CV.dtype else hidden_ND.new_empty(buffer_CV.shape)
    result_CV = kept_KV.new_empty(size if len(kept_KV) < len(hidden_ND) else 0, len(weight_VD))
    for start in range(0, len(hidden_ND), options.chunk_rows):
        chunk = slice(start, min(start + options.chunk_rows, len(hidden_ND)))
        is_kept, size = chunk.stop <= len(kept_KV), chunk.stop - start
        logprob_CV = kept_KV[chunk] if is_kept else result_CV[:size]
        if not (is_kept and is_known):
            logits = logits_CV[:size]
            torch.addmm(logits, hidden_ND[chunk], weight_VD.T, beta=0, alpha=options.inverse_temperature, out=logits)
            torch.log_softmax(logits, -1, dtype=logprob_CV.dtype, out=logprob_CV)
        yield chunk, logprob_CV, buffer_CV[:size]
