"""Which implementation of the operation runs where: chosen by name, or by device and by what is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal, cast

from mas_hpc_kernels.errors import KernelError
from mas_hpc_kernels.operation import Backend

BackendName = Literal["auto", "torch", "triton", "sycl"]
MODULES = {"torch": "mas_hpc_kernels.chunked", "triton": "mas_hpc_kernels.triton", "sycl": "mas_hpc_kernels.sycl"}
"""Each has the functions of operation.Backend and missing(device_type): why it cannot run there, or None."""
ONCE = ("torch", "sycl")
"""Those that are an operation.FrozenBackend too."""
PREFERRED = {"cuda": ("triton", "torch"), "xpu": ("triton", "sycl", "torch")}
"""By type of device; everywhere else torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A backend and why it is the one.

    Example: Choice(name="torch", reason="preferred on cpu")
    """

    name: str
    reason: str


@cache
def missing(name: str, device_type: str) -> str | None:
    """Why a backend cannot run on a type of device, with the remedy; None if it can."""
    return cast("str | None", import_module(MODULES[name]).missing(device_type))


def choose(name: BackendName, device_type: str) -> Choice:
    """The backend of that name, or for `auto` the first that can run there. Raises KernelError for one that cannot."""
    if name != "auto":
        if reason := missing(name, device_type):
            raise KernelError(f"{name} kernels cannot run on {device_type}: {reason}")
        return Choice(name=name, reason="named")
    passed_over = []
    for candidate in PREFERRED.get(device_type, ("torch",)):
        if not (reason := missing(candidate, device_type)):
            break
        passed_over.append(f"{candidate} cannot run: {reason}")
    return Choice(name=candidate, reason="; ".join(passed_over) or f"preferred on {device_type}")


@cache
def load(name: str) -> Backend:
    """The module of a backend that can run here."""
    return cast(Backend, import_module(MODULES[name]))
