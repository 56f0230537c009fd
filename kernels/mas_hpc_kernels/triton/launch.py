"""Tiles and launches of the kernels.

The two products of a backward are left to the vendor's library, a chunk of rows at a time. Both in one kernel would need
atomic sums, whose order, and so the result, differs from run to run, or a third computation of the logits.
Legend: N targets, V vocabulary, D hidden, S parts of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mas_hpc_kernels.operation import Gradients, Problem, Statistics, Upstream, merge_parts
from mas_hpc_kernels.triton.kernels import gradient_kernel, statistics_kernel

CHUNK_ELEMENTS = 64 << 20
"""Gradients of logits that exist at once."""
NUM_PROGRAMS = 512
"""A vocabulary is cut into parts until there are as many, so that all of a GPU has work: 108 to 132 cores of a CUDA GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of what one program works on, and how it is compiled.

    Example: Tiles(rows=128, vocabulary=128, hidden=64, num_warps=8, num_stages=3)
    """

    rows: int
    vocabulary: int
    hidden: int
    num_warps: int
    num_stages: int


TILES = {
    ("cuda", 2): Tiles(rows=128, vocabulary=128, hidden=64, num_warps=8, num_stages=3),
    ("cuda", 4): Tiles(rows=64, vocabulary=64, hidden=32, num_warps=4, num_stages=3),
    ("hip", 2): Tiles(rows=128, vocabulary=128, hidden=64, num_warps=8, num_stages=2),
    ("hip", 4): Tiles(rows=64, vocabulary=64, hidden=32, num_warps=4, num_stages=2),
    ("xpu", 2): Tiles(rows=64, vocabulary=128, hidden=32, num_warps=16, num_stages=2),
    ("xpu", 4): Tiles(rows=32, vocabulary=64, hidden=32, num_warps=8, num_stages=2),
    ("cpu", 2): Tiles(rows=16, vocabulary=8192, hidden=16, num_warps=1, num_stages=1),
    ("cpu", 4): Tiles(rows=16, vocabulary=8192, hidden=16, num_warps=1, num_stages=1),
}
"""By kind of device and bytes of an element, without a search: a search would make results differ from run to run. The
interpreter (cpu) takes the same time for large tiles as for small ones."""


def tiles(problem: Problem) -> Tiles:
    """Those of the problem's device and type; float64 takes those of float32."""
    kind = problem.hidden_ND.device.type
    kind = "hip" if kind == "cuda" and torch.version.hip else kind
    return TILES[kind, min(problem.hidden_ND.element_size(), 4)]


def statistics(problem: Problem) -> Statistics:
    """As operation.Backend."""
    chosen, problem = tiles(problem), _contiguous(problem)
    num_rows, vocabulary = len(problem.hidden_ND), len(problem.weight_VD)
    row_blocks, column_blocks = triton.cdiv(num_rows, chosen.rows), triton.cdiv(vocabulary, chosen.vocabulary)
    parts = min(column_blocks, triton.cdiv(NUM_PROGRAMS, max(row_blocks, 1)))
    part = triton.cdiv(column_blocks, parts) * chosen.vocabulary
    found = torch.empty(4, parts, num_rows, dtype=problem.dtype, device=problem.hidden_ND.device)
    if row_blocks:
        statistics_kernel[row_blocks, parts](
            *_tensors(problem), *found, *_sizes(problem), part, *_scalars(problem), **_constants(problem, chosen)
        )
    return merge_parts(Statistics(*found))


def gradients(problem: Problem, whole: Statistics, upstream: Upstream, *, need_head: bool) -> Gradients:
    """As operation.Backend."""
    chosen, problem = tiles(problem), _contiguous(problem)
    grad_ND = torch.empty_like(problem.hidden_ND, dtype=problem.dtype)
    grad_VD = torch.zeros_like(problem.weight_VD, dtype=problem.dtype) if need_head else None
    grad_V = torch.zeros_like(problem.bias_V, dtype=problem.dtype) if need_head and problem.bias_V is not None else None
    logprob_N = upstream.logprob_N.contiguous()
    entropy_N = None if upstream.entropy_N is None else upstream.entropy_N.contiguous()
    mean_N = whole.weighted_N / whole.sum_N
    hidden_ND, weight_VD, bias_V, target_N = _tensors(problem)
    size = max(1, CHUNK_ELEMENTS // len(weight_VD))
    for start in range(0, len(hidden_ND), size):
        rows = slice(start, min(start + size, len(hidden_ND)))
        num_rows = rows.stop - start
        product_CV = hidden_ND.new_empty(num_rows, len(weight_VD))
        grid = triton.cdiv(num_rows, chosen.rows), triton.cdiv(len(weight_VD), chosen.vocabulary)
        gradient_kernel[grid](
            hidden_ND[rows], weight_VD, bias_V, target_N[rows], whole.max_N[rows], whole.sum_N[rows], mean_N[rows],
            logprob_N[rows], None if entropy_N is None else entropy_N[rows], product_CV,
            num_rows, *_sizes(problem)[1:], *_scalars(problem),
            HAS_ENTROPY=entropy_N is not None, **_constants(problem, chosen),
        )  # fmt: skip
        grad_ND[rows] = product_CV @ weight_VD
        if grad_VD is not None:
            grad_VD.add_(product_CV.T @ hidden_ND[rows])
        if grad_V is not None:
            grad_V.add_(product_CV.sum(0, dtype=grad_V.dtype))
    return Gradients(grad_ND, grad_VD, grad_V)


def _contiguous(problem: Problem) -> Problem:
    return replace(problem, hidden_ND=problem.hidden_ND.contiguous(), weight_VD=problem.weight_VD.contiguous())


def _tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return problem.hidden_ND, problem.weight_VD, problem.bias_V, problem.target_N


def _sizes(problem: Problem) -> tuple[int, ...]:
    """Rows, vocabulary, hidden size, and strides of hidden states and head."""
    hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
    return *hidden_ND.shape[:1], *weight_VD.shape, hidden_ND.stride(0), weight_VD.stride(0)


def _scalars(problem: Problem) -> tuple[float, float]:
    return problem.inverse_temperature, problem.softcap


def _constants(problem: Problem, chosen: Tiles) -> dict[str, object]:
    """What the kernels are compiled for."""
    return {
        "HAS_BIAS": problem.bias_V is not None,
        "HAS_SOFTCAP": problem.softcap > 0,
        "DTYPE": tl.float64 if problem.dtype == torch.float64 else tl.float32,
        "UPCAST": triton.knobs.runtime.interpret and problem.hidden_ND.element_size() == 2,
        "BLOCK_N": chosen.rows,
        "BLOCK_V": chosen.vocabulary,
        "BLOCK_D": chosen.hidden,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
