"""The SYCL kernels on Intel GPUs: torch operators from extension.sycl, built once by build_extension.py."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from mas_hpc_kernels.operation import Statistics, Upstream
from mas_hpc_kernels.sycl.rows import Geometry, Rows

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "kernels.hpp", FOLDER / "extension.sycl")
NAME = "mas_hpc_sycl"
BUILD = "TORCH_XPU_ARCH_LIST=pvc python -m mas_hpc_kernels.sycl.build_extension"


class XpuKernels:
    """The kernels on the XPU of the tensors, in the order of its current stream; see rows.Kernels."""

    def __init__(self, geometry: Geometry) -> None:
        _load()
        self._geometry = geometry

    def row_statistics(self, rows: Rows, into: Statistics) -> None:
        torch.ops.mas_hpc_sycl.row_statistics(*rows, *self._geometry, *into)

    def product_gradient(self, rows: Rows, whole: Statistics, upstream: Upstream) -> None:
        torch.ops.mas_hpc_sycl.product_gradient(*rows, *self._geometry, *whole[:3], *upstream)


def library() -> Path:
    """Where the extension for this torch and these sources is, once it is built."""
    texts = (torch.__version__, *(source.read_text(encoding="utf-8") for source in SOURCES))
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "mas_hpc_kernels" / fingerprint / f"{NAME}.so"


def missing() -> str | None:
    """Why XPU tensors cannot be taken here, with the remedy; None if nothing is missing."""
    if not torch.xpu.is_available():
        return f"the SYCL backend on the XPU needs a torch that sees an XPU; torch {torch.__version__} sees none"
    if not library().exists():
        return f"the SYCL extension is not built for torch {torch.__version__}: {BUILD} (needs icpx and ninja on the PATH)"
    return None


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(library()))
