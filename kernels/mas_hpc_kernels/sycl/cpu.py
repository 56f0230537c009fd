"""The SYCL kernels on the CPU device: compiled at run time with PyPI's intel-sycl-rt and intel-opencl-rt, no oneAPI needed.

First use on a machine builds host.cpp with g++ and tries the kernels in a process of its own, so that a crash or a hang of
a compiler is an error of this one. Later processes find both in ~/.cache/mas_hpc_kernels.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mas_hpc_kernels.errors import KernelError
from mas_hpc_kernels.operation import Statistics, Upstream
from mas_hpc_kernels.sycl import host
from mas_hpc_kernels.sycl.rows import Geometry, Rows

CACHE = Path.home() / ".cache" / "mas_hpc_kernels"
PACKAGES = ("intel-sycl-rt", "intel-opencl-rt")
TIMEOUT_S = 300
"""Of g++ and of the trial of the kernels: 3 s each on a quiet machine."""


class _Installed(NamedTuple):
    library: Path
    driver: Path
    include: Path


class CpuKernels:
    """The kernels on this machine's CPU, with as many threads as torch has; see rows.Kernels."""

    def __init__(self, geometry: Geometry) -> None:
        self._host = _open(geometry)
        self._work_group_size = geometry.work_group_size

    @property
    def device(self) -> str:
        return self._host.device

    def row_statistics(self, rows: Rows, into: Statistics) -> None:
        self._launch("row_statistics", rows, into)

    def product_gradient(self, rows: Rows, whole: Statistics, upstream: Upstream) -> None:
        self._launch("product_gradient", rows, (*whole[:3], *upstream, rows.product_CV))

    def _launch(self, name: str, rows: Rows, tensors: Sequence[Tensor | None]) -> None:
        num_rows, vocabulary = rows.product_CV.shape
        dtype = str(rows.product_CV.dtype).removeprefix("torch.")
        real = host.REAL[dtype]
        given = (_pointer(rows.product_CV), _pointer(rows.target_C), _pointer(rows.bias_V))
        scalars = ((real, rows.softcap), (real, rows.inverse_temperature))
        arguments = (*given, *scalars, *map(_pointer, tensors), ("l", vocabulary))
        self._host.launch(f"{name}_{dtype}", num_rows, self._work_group_size, arguments)


def missing() -> str | None:
    """Why the CPU device cannot be used here, with the remedy; None if nothing is missing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"SYCL on the CPU needs Linux on x86-64, for which Intel has a runtime on PyPI; this is {platform.platform()}"
    absent = [package for package in PACKAGES if not _is_installed(package)]
    if absent:
        return f"SYCL on the CPU needs {' and '.join(absent)}: pip install {' '.join(absent)}, or the extra mas-hpc[sycl]"
    if shutil.which("g++") is None:
        return "SYCL on the CPU needs g++ to build its host library: apt-get install g++"
    return None


def _is_installed(package: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=package))


@functools.cache
def _open(geometry: Geometry) -> host.Host:
    installed = _installed()
    library = _library(installed)
    options = (library, installed.driver, library.parent, torch.get_num_threads(), geometry.sub_group_size)
    tried = library.with_name(f"tried-{geometry.sub_group_size}-{geometry.work_group_size}")
    if not tried.exists():
        _run((sys.executable, host.__file__, *options, geometry.work_group_size), "the SYCL compiler's trial")
        tried.touch()
    return host.Host(*options)


def _installed() -> _Installed:
    headers = _file("intel-sycl-rt", "sycl/sycl.hpp").parents[1]
    return _Installed(_file("intel-sycl-rt", "libsycl.so"), _file("intel-opencl-rt", "libintelocl.so"), headers)


def _library(installed: _Installed) -> Path:
    """The host library, built if it is not there; several processes may do so at once, the last one wins."""
    library = CACHE / _fingerprint() / "host.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", f"-I{installed.include}")
        linked = (installed.library, f"-Wl,-rpath,{installed.library.parent}")
        _run(("g++", *flags, host.SOURCES[-1], *linked, "-o", unfinished), "g++")
        unfinished.replace(library)
    return library


def _file(package: str, suffix: str) -> Path:
    files = importlib.metadata.files(package) or []
    return next(Path(str(file.locate())).resolve() for file in files if str(file).endswith(f"/{suffix}"))


def _fingerprint() -> str:
    """Of everything that decides what the compilers do: sources, their versions, the CPU's instruction set."""
    instructions = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("flags")]
    texts = [*(source.read_text(encoding="utf-8") for source in host.SOURCES), *map(importlib.metadata.version, PACKAGES)]
    return hashlib.sha256("\0".join([*texts, *instructions[:1]]).encode()).hexdigest()[:16]


def _run(command: Sequence[object], name: str) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{name} did not end within {TIMEOUT_S} s: {' '.join(words)}") from error
    if done.returncode:
        end = f"died of {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"failed ({done.returncode})"
        raise KernelError(f"{name} {end}: {' '.join(words)}\n{done.stderr[-4000:]}")


def _pointer(tensor: Tensor | None) -> tuple[str, int]:
    if tensor is None:
        return "p", 0
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return "p", tensor.data_ptr()
