"""Time both kernels for each geometry on this machine's device: python -m mas_hpc_kernels.sycl.time_geometries.

Prints microseconds for one chunk, 256 rows of 49152 float32 logits; the fastest belongs into DEFAULTS.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import torch

from mas_hpc_kernels.operation import Statistics, Upstream
from mas_hpc_kernels.sycl import kernels_for
from mas_hpc_kernels.sycl.rows import Geometry, Rows

REPEATS = 10
SUB_GROUPS, WORK_GROUPS = (16, 32), (64, 128, 256, 512, 1024)


def main() -> None:
    """Print a line per geometry."""
    device = "xpu" if torch.xpu.is_available() else "cpu"
    ones_C = torch.ones(256, device=device)
    target_C = torch.zeros_like(ones_C, dtype=torch.int64)
    rows = Rows(torch.randn(256, 49152, device=device), target_C, None, 0.0, 1.0)
    statistics = Statistics(*(ones_C.clone() for _ in Statistics._fields))
    print("sub-group  work-group  statistics  gradient")
    for geometry in itertools.starmap(Geometry, itertools.product(SUB_GROUPS, WORK_GROUPS)):
        kernels = kernels_for(device, geometry)
        forward = _microseconds(partial(kernels.row_statistics, rows, statistics), device)
        backward = _microseconds(partial(kernels.product_gradient, rows, statistics, Upstream(ones_C, None)), device)
        print(f"{geometry.sub_group_size:9}  {geometry.work_group_size:10}  {forward:10.0f}  {backward:8.0f}")


def _microseconds(action: Callable[[], None], device: str) -> float:
    action()
    start = _now(device)
    for _ in range(REPEATS):
        action()
    return (_now(device) - start) / REPEATS * 1e6


def _now(device: str) -> float:
    if device == "xpu":
        torch.xpu.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
