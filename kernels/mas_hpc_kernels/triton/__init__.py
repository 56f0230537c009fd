"""Backend in Triton: statistics from logits that never leave the chip, and the gradient of a chunk of logits in one kernel."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from mas_hpc_kernels.operation import Gradients, Problem, Statistics, Upstream

COMPILERS = {"cuda": "amd" if torch.version.hip else "nvidia", "xpu": "intel"}
"""Triton's name of what compiles for a type of device."""


def missing(device_type: str) -> str | None:
    """Why this backend cannot take tensors of a device, with the remedy; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton, or triton-xpu for Intel GPUs"
    import triton
    from triton.backends import backends

    if device_type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return "Triton compiles for GPUs only; on a CPU it can be interpreted, very slowly: set TRITON_INTERPRET=1"
    if device_type not in COMPILERS:
        return f"Triton has no compiler for {device_type}"
    if (compiler := COMPILERS[device_type]) not in backends:
        return f"triton {triton.__version__} has compilers for {', '.join(backends)}, but none for {compiler}"
    return None


# Imported at the first call: a machine without Triton asks what is missing here, too.
def statistics(problem: Problem, *, need_entropy: bool) -> Statistics:
    """As operation.Backend; the entropy's sum comes with the others, needed or not."""
    from mas_hpc_kernels.triton import launch

    return launch.statistics(problem)


def gradients(problem: Problem, whole: Statistics, upstream: Upstream, *, need_head: bool) -> Gradients:
    """As operation.Backend."""
    from mas_hpc_kernels.triton import launch

    return launch.gradients(problem, whole, upstream, need_head=need_head)
