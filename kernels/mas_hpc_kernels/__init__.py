"""Fused operations of the training path. `linear_logprob` is the one loss kernel; `reference` is its oracle."""

from mas_hpc_kernels.chunked import linear_logprob

__all__ = ["linear_logprob"]
