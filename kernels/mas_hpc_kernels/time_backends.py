"""Time each backend that can run on a device: python -m mas_hpc_kernels.time_backends xpu [--rows 8192 ...].

Prints milliseconds of wall time, the least of five calls, and on accelerators the peak of allocated memory above the inputs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import cast, get_args

import torch
from torch import Tensor

from mas_hpc_kernels.backends import BackendName, missing
from mas_hpc_kernels.fused import linear_logprob

REPEATS = 5
MODES = {"trained head": (True, True), "frozen head": (True, False), "no gradient": (False, False)}
"""Whether hidden states and head need gradients."""


def main() -> None:
    """Print a line per mode and backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cpu", "cuda", "xpu"])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    hidden_ND = torch.randn(given.rows, given.hidden, device=given.device, dtype=dtype)
    weight_VD = torch.randn(given.vocabulary, given.hidden, device=given.device, dtype=dtype) / given.hidden**0.5
    target_N = torch.randint(given.vocabulary, (given.rows,), device=given.device)
    for name in (cast(BackendName, name) for name in get_args(BackendName) if name != "auto"):
        if reason := missing(name, given.device):
            print(f"{name}: cannot run: {reason}")
            continue
        for mode, (trains_hidden, trains_head) in MODES.items():
            leaves = hidden_ND.detach().requires_grad_(trains_hidden), weight_VD.detach().requires_grad_(trains_head)
            milliseconds, memory = _measure(partial(_step, name, *leaves, target_N), given.device)
            print(f"{name:8}{mode:14}{milliseconds:10.1f} ms{memory}", flush=True)


def _step(backend: BackendName, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> None:
    logprob_N, _ = linear_logprob(hidden_ND, weight_VD, target_N, backend=backend)
    leaves = [leaf for leaf in (hidden_ND, weight_VD) if leaf.requires_grad]
    if leaves:
        torch.autograd.grad(logprob_N.sum(), leaves)


def _measure(work: Callable[[], None], device: str) -> tuple[float, str]:
    """Milliseconds, and what there is to say about memory."""
    module = torch.get_device_module(device)
    work()
    module.synchronize()
    before = 0
    if device != "cpu":
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        module.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = f"{(module.max_memory_allocated() - before) / 2**20:10.0f} MiB" if device != "cpu" else ""
    return min(seconds) * 1e3, memory


if __name__ == "__main__":
    main()
