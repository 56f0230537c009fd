"""Backend in SYCL: each logit is read once, by kernels that torch's own matrix products surround.

The products (oneDNN on XPU, with its matrix engines) are made a chunk of rows at a time, small enough to stay in the last
cache of a PVC tile. Kernels: kernels.hpp. CPU tensors take the route of cpu.py, XPU tensors that of xpu.py.
Legend: N targets, V vocabulary, D hidden, C rows of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from mas_hpc_kernels.chunked import KEPT_ELEMENTS, target_rows
from mas_hpc_kernels.errors import KernelError
from mas_hpc_kernels.operation import Gradients, Problem, Statistics, Upstream, VocabularyShard, merge
from mas_hpc_kernels.sycl import cpu, xpu
from mas_hpc_kernels.sycl.rows import Geometry, Kernels, Rows

CHUNK_ELEMENTS = 256 * 49152
DEFAULTS = {"cpu": Geometry(sub_group_size=32, work_group_size=64), "xpu": Geometry(sub_group_size=32, work_group_size=512)}


def missing(device_type: str) -> str | None:
    """Why this backend cannot take tensors of a device, with the remedy; None if it can."""
    if device_type not in DEFAULTS:
        return f"the SYCL backend takes tensors on {' or '.join(DEFAULTS)}, not on {device_type}"
    return {"cpu": cpu.missing, "xpu": xpu.missing}[device_type]()


def statistics(problem: Problem, *, need_entropy: bool = True, geometry: Geometry | None = None) -> Statistics:
    """As operation.Backend; the entropy's sum comes with the others, needed or not. Raises KernelError if it cannot run."""
    kernels, found = kernels_for(problem.hidden_ND.device.type, geometry), Statistics.empty(problem)
    for chunk, rows in _chunks(problem):
        kernels.row_statistics(rows, _at(found, chunk))
        if problem.kept is not None and problem.hidden_ND.shape[0] * problem.weight_VD.shape[0] <= KEPT_ELEMENTS:
            problem.kept.append(rows.product_CV.clone())
    return found


def statistics_and_slope(
    problem: Problem, shard: VocabularyShard | None, *, need_entropy: bool = True, geometry: Geometry | None = None
) -> tuple[Statistics, Tensor]:
    """As operation.FrozenBackend. Raises KernelError if it cannot run."""
    kernels, found = kernels_for(problem.hidden_ND.device.type, geometry), Statistics.empty(problem)
    mean_ND = torch.empty_like(problem.hidden_ND, dtype=problem.dtype)
    minus_N, nowhere_N = torch.full_like(found.sum_N, -1), torch.full_like(problem.target_N, -1)
    for chunk, rows in _chunks(problem):
        kernels.row_statistics(rows, _at(found, chunk))
        untargeted = rows._replace(target_C=nowhere_N[chunk])  # leaves probability * slope
        kernels.product_gradient(untargeted, _at(found, chunk), Upstream(minus_N[chunk], None))
        mean_ND[chunk] = rows.product_CV @ problem.weight_VD
    whole = merge(found, shard)
    mean_ND *= ((found.max_N - whole.max_N).exp() * (found.sum_N / whole.sum_N))[:, None]
    slope_ND = target_rows(problem, whole).mul_(problem.inverse_temperature).sub_(mean_ND)
    return whole, shard.reduce(slope_ND, "sum") if shard else slope_ND


def gradients(
    problem: Problem, whole: Statistics, upstream: Upstream, *, need_head: bool, geometry: Geometry | None = None
) -> Gradients:
    """As operation.Backend. Raises KernelError if it cannot run."""
    kernels = kernels_for(problem.hidden_ND.device.type, geometry)
    hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
    result = Gradients(
        torch.empty_like(hidden_ND, dtype=problem.dtype),
        torch.zeros_like(weight_VD, dtype=problem.dtype) if need_head else None,
        torch.zeros_like(problem.bias_V, dtype=problem.dtype) if need_head and problem.bias_V is not None else None,
    )
    logprob_N, entropy_N = upstream
    for chunk, rows in _chunks(problem):
        here = Upstream(logprob_N[chunk].contiguous(), None if entropy_N is None else entropy_N[chunk].contiguous())
        kernels.product_gradient(rows, _at(whole, chunk), here)
        result.hidden_ND[chunk] = rows.product_CV @ weight_VD
        if result.weight_VD is not None:
            _add_product(result.weight_VD, rows.product_CV.T, hidden_ND[chunk])
        if result.bias_V is not None:
            result.bias_V.add_(rows.product_CV.sum(0, dtype=problem.dtype))
    return result


@functools.cache
def kernels_for(device_type: str, geometry: Geometry | None) -> Kernels:
    """The kernels of a type of device, compiled and ready. Raises KernelError if they cannot run here."""
    reason = missing(device_type)
    if reason:
        raise KernelError(reason)
    geometry = geometry or DEFAULTS[device_type]
    return cpu.CpuKernels(geometry) if device_type == "cpu" else xpu.XpuKernels(geometry)


def _chunks(problem: Problem) -> Iterator[tuple[slice, Rows]]:
    """Yield the rows of each chunk, whose products may be overwritten; products that were kept are not made again."""
    num_rows, vocabulary = len(problem.hidden_ND), len(problem.weight_VD)
    size = max(1, min(CHUNK_ELEMENTS // vocabulary, num_rows))
    buffer_CV = problem.hidden_ND.new_empty(size, vocabulary)
    bias_V = None if problem.bias_V is None else problem.bias_V.to(problem.dtype).contiguous()
    kept = iter(tuple(problem.kept or ()))
    for start in range(0, num_rows, size):
        chunk = slice(start, min(start + size, num_rows))
        product_CV = buffer_CV[: chunk.stop - start]
        if (known_CV := next(kept, None)) is not None:
            product_CV.copy_(known_CV)
        else:
            torch.mm(problem.hidden_ND[chunk], problem.weight_VD.T, out=product_CV)
        target_C = problem.target_N[chunk].contiguous()
        yield chunk, Rows(product_CV, target_C, bias_V, problem.softcap, problem.inverse_temperature)


def _at(values: Statistics, chunk: slice) -> Statistics:
    return Statistics(*(values_N[chunk] for values_N in values))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total that may be of a wider type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
