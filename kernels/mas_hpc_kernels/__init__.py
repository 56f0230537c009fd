"""Fused operations of the training path. `linear_logprob` is the one loss kernel; `reference` is its oracle."""

from mas_hpc_kernels.backends import BackendName, Choice, choose, missing
from mas_hpc_kernels.errors import KernelError
from mas_hpc_kernels.fused import linear_logprob
from mas_hpc_kernels.operation import LogitRule, VocabularyShard

__all__ = [
    "BackendName",
    "Choice",
    "KernelError",
    "LogitRule",
    "VocabularyShard",
    "choose",
    "linear_logprob",
    "missing",
]
