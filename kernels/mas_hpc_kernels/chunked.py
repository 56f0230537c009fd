"""Plain torch, a block of logits at a time: small enough for a CPU's cache, and large enough for its matrix products.

The softmax is online: a block of the vocabulary rescales what the blocks before it have summed up (Milakov and Gimelshein,
arXiv 1805.02867). A frozen head also sums up softmax @ weight that way, so that its backward needs no logits.
Legend: N targets, V vocabulary, D hidden, C targets of one chunk, B vocabulary of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mas_hpc_kernels.operation import NEGLIGIBLE, Gradients, Problem, Statistics, Upstream, VocabularyShard, merge

MIN_ROWS = 512
"""Of a chunk: with fewer the matrix products are slower."""
BLOCK_VOCABULARY = 4096
BLOCK_ELEMENTS = 512 * 4096
"""Logits of a block: chunks of a small vocabulary have more rows."""
KEPT_ELEMENTS = 64 << 20
"""Logits that are kept for the backward, if these are all: 256 MiB in float32 spare a fourth of a trained head's products."""


class _Block(NamedTuple):
    columns: slice
    weight_BD: Tensor
    """In the type of the matrix products."""
    logits_CB: Tensor
    """In Problem.dtype; a buffer of ours that may be overwritten."""
    scratch_CB: Tensor
    """Another one."""
    slope_CB: Tensor | None
    """d softcap(x) / dx, where there is a cap and gradients are needed."""
    column_C1: Tensor
    """The target's column, and any other where the target is in another block."""
    is_here_C1: Tensor
    """Whether the target is in this block."""


def missing(device_type: str) -> None:
    """torch runs everywhere."""


def statistics(problem: Problem, *, need_entropy: bool) -> Statistics:
    """As operation.Backend."""
    found = Statistics.empty(problem)
    fits = len(problem.hidden_ND) * len(problem.weight_VD) <= KEPT_ELEMENTS
    for rows, hidden_CD in _chunks(problem):
        chunk = Statistics(*(values_N[rows] for values_N in found))
        for block in _blocks(problem, rows, hidden_CD):
            if problem.kept is not None and fits:
                problem.kept.append(block.logits_CB.clone())
            _absorb(chunk, block, need_entropy=need_entropy)
    return found


def statistics_and_slope(
    problem: Problem, shard: VocabularyShard | None, *, need_entropy: bool
) -> tuple[Statistics, Tensor]:  # fmt: skip
    """Statistics of the whole vocabulary and d logprob / d hidden, [N, D], of a head that needs no gradient."""
    found, mean_ND = Statistics.empty(problem), problem.hidden_ND.new_zeros(problem.hidden_ND.shape, dtype=problem.dtype)
    for rows, hidden_CD in _chunks(problem):
        chunk = Statistics(*(values_N[rows] for values_N in found))
        for block in _blocks(problem, rows, hidden_CD, need_slope=bool(problem.softcap)):
            mean_ND[rows] *= _absorb(chunk, block, need_entropy=need_entropy)[:, None]
            _add_product(mean_ND[rows], _times(block.scratch_CB, block.slope_CB), block.weight_BD)
    whole = merge(found, shard)
    mean_ND *= ((found.max_N - whole.max_N).exp() / whole.sum_N)[:, None]
    slope_ND = target_rows(problem, whole).sub_(mean_ND).mul_(problem.inverse_temperature)
    return whole, shard.reduce(slope_ND, "sum") if shard else slope_ND


def gradients(problem: Problem, whole: Statistics, upstream: Upstream, *, need_head: bool) -> Gradients:
    """As operation.Backend."""
    grad_ND = problem.hidden_ND.new_zeros(problem.hidden_ND.shape, dtype=problem.dtype)
    grad_VD = problem.weight_VD.new_zeros(problem.weight_VD.shape, dtype=problem.dtype) if need_head else None
    grad_V = grad_ND.new_zeros(len(problem.weight_VD)) if need_head and problem.bias_V is not None else None
    # A row's factor is applied to its hidden state and its result, which are much smaller than its logits.
    scale_N = -problem.inverse_temperature / whole.sum_N
    scale_N = scale_N if upstream.entropy_N is not None else scale_N * upstream.logprob_N
    known = iter(problem.kept or ())
    for rows, hidden_CD in _chunks(problem):
        scale_C1 = scale_N[rows, None]
        scaled_CD = hidden_CD * scale_C1.to(hidden_CD.dtype)
        for block in _blocks(problem, rows, hidden_CD, need_slope=bool(problem.softcap), known=known):
            slope_CB = _logit_slope(block, Statistics(*(values_N[rows] for values_N in whole)), upstream, rows)
            _add_product(grad_ND[rows], slope_CB, block.weight_BD)
            if grad_VD is not None:
                _add_product(grad_VD[block.columns], slope_CB.T, scaled_CD)
            if grad_V is not None:
                grad_V[block.columns].addmv_(slope_CB.T, scale_C1[:, 0])
        grad_ND[rows] *= scale_C1
    return Gradients(grad_ND, grad_VD, grad_V)


def _logit_slope(block: _Block, chunk: Statistics, upstream: Upstream, rows: slice) -> Tensor:
    """d loss / d logit, [C, B], times -sum: exp(logit - max) - sum onehot, in the simplest case also over upstream."""
    target_C1 = torch.where(block.is_here_C1, -chunk.sum_N[:, None], 0.0)
    shifted_CB = block.logits_CB.sub_(chunk.max_N[:, None])
    if upstream.entropy_N is None:
        result_CB = shifted_CB.exp_()
    else:
        result_CB = torch.exp(shifted_CB, out=block.scratch_CB)
        shifted_CB.clamp_(min=NEGLIGIBLE).sub_((chunk.weighted_N / chunk.sum_N)[:, None]).mul_(upstream.entropy_N[rows, None])
        result_CB.mul_(shifted_CB.add_(upstream.logprob_N[rows, None]))
        target_C1 = target_C1 * upstream.logprob_N[rows, None]
    return _times(result_CB.scatter_add_(1, block.column_C1, target_C1), block.slope_CB)


def _absorb(chunk: Statistics, block: _Block, *, need_entropy: bool) -> Tensor:
    """Add a block to the statistics; leave exp(logit - max) in the scratch and return what earlier sums are worth now, [C]."""
    logits_CB, exp_CB = block.logits_CB, block.scratch_CB
    target_C = torch.where(block.is_here_C1, logits_CB.gather(1, block.column_C1), 0.0)[:, 0]
    chunk.target_N.add_(target_C)
    max_C = torch.maximum(chunk.max_N, logits_CB.amax(1))
    shift_C = chunk.max_N - max_C
    rescale_C = shift_C.exp()
    torch.exp(logits_CB.sub_(max_C[:, None]), out=exp_CB)
    if need_entropy:
        weighted_C = logits_CB.clamp_(min=NEGLIGIBLE).mul_(exp_CB).sum(1)
        chunk.weighted_N.add_(chunk.sum_N * shift_C).mul_(rescale_C).add_(weighted_C)
    chunk.sum_N.mul_(rescale_C).add_(exp_CB.sum(1))
    chunk.max_N.copy_(max_C)
    return rescale_C


def _chunks(problem: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the targets with their hidden states, in the type of the matrix products."""
    dtype = product_dtype(problem.hidden_ND.dtype, problem.hidden_ND.device)
    size = max(MIN_ROWS, BLOCK_ELEMENTS // len(problem.weight_VD))
    for start in range(0, len(problem.hidden_ND), size):
        rows = slice(start, min(start + size, len(problem.hidden_ND)))
        yield rows, problem.hidden_ND[rows].to(dtype)


def _blocks(
    problem: Problem, rows: slice, hidden_CD: Tensor, *, need_slope: bool = False, known: Iterator[Tensor] | None = None
) -> Iterator[_Block]:  # fmt: skip
    """Yield the logits of a chunk, block by block, in buffers that the next block overwrites: fresh ones cost page faults.

    They are taken from `known` as long as it has any, else computed.
    """
    size = len(hidden_CD) * min(BLOCK_VOCABULARY, len(problem.weight_VD))
    buffers = [hidden_CD.new_empty(size, dtype=problem.dtype) for _ in range(2 + need_slope)]
    for start in range(0, len(problem.weight_VD), BLOCK_VOCABULARY):
        columns = slice(start, min(start + BLOCK_VOCABULARY, len(problem.weight_VD)))
        width = columns.stop - start
        weight_BD = problem.weight_VD[columns].to(hidden_CD.dtype)
        logits_CB, scratch_CB, *slopes = (buffer[: len(hidden_CD) * width].view(-1, width) for buffer in buffers)
        slope_CB = slopes[0] if need_slope else None
        if known and (known_CB := next(known, None)) is not None:
            logits_CB.copy_(known_CB)
        else:
            _write_logits(problem, hidden_CD, weight_BD, columns, logits_CB)
        if slope_CB is not None:
            torch.div(logits_CB, problem.softcap * problem.inverse_temperature, out=slope_CB).square_().neg_().add_(1.0)
        column_C1 = problem.target_N[rows, None] - start
        is_here_C1 = (column_C1 >= 0) & (column_C1 < width)
        yield _Block(columns, weight_BD, logits_CB, scratch_CB, slope_CB, column_C1.clamp(0, width - 1), is_here_C1)


def _write_logits(problem: Problem, hidden_CD: Tensor, weight_BD: Tensor, columns: slice, logits_CB: Tensor) -> None:
    alpha = 1.0 / problem.softcap if problem.softcap else problem.inverse_temperature
    if hidden_CD.dtype == logits_CB.dtype:
        torch.addmm(logits_CB, hidden_CD, weight_BD.T, beta=0, alpha=alpha, out=logits_CB)
    else:
        logits_CB.copy_(hidden_CD @ weight_BD.T).mul_(alpha)
    if problem.bias_V is not None:
        logits_CB.add_(problem.bias_V[columns].to(logits_CB.dtype), alpha=alpha)
    if problem.softcap:
        logits_CB.tanh_().mul_(problem.softcap * problem.inverse_temperature)


def target_rows(problem: Problem, whole: Statistics) -> Tensor:
    """The head's rows of the targets, [N, D], times the slope of the cap there; 0 where another shard has them."""
    is_here_N = (problem.target_N >= 0) & (problem.target_N < len(problem.weight_VD))
    factor_N = is_here_N.to(problem.dtype)
    if problem.softcap:
        factor_N *= 1.0 - (whole.target_N / (problem.softcap * problem.inverse_temperature)).square()
    return problem.weight_VD[problem.target_N * is_here_N].to(problem.dtype) * factor_N[:, None]


def _times(left: Tensor, right: Tensor | None) -> Tensor:
    return left if right is None else left.mul_(right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with the product in the type of `right`."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(right.dtype) @ right)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which matrices are multiplied: on a CPU without instructions for it, 16 bits are 5 to 35 times slower."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    capabilities = torch.cpu.get_capabilities()
    native = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return dtype if any(capabilities.get(name, False) for name in native) else torch.float32
