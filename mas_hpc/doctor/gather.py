"""Look at this node, once, for all checks: nothing is judged here, and every wait ends."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from mas_hpc.config import RunConfig
from mas_hpc.distributed import checkpoint_files, mpi
from mas_hpc.distributed.device import find_offer
from mas_hpc.distributed.launchers import find_place
from mas_hpc.doctor.exchange import Exchange
from mas_hpc.doctor.facts import Devices, Facts, Host, Room, Saved, Software
from mas_hpc.doctor.network import reach_all
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.launch.site import Site

PROJECT = "mas-hpc"
BUILT_IN = ("tiny", "smollm2")
"""Models that are no folders and not of the hub."""
SHARED_MEMORY = Path("/dev/shm")
_ASK_S = 10.0
"""For a program that tells its version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be looked at.

    Example: Subject(site=load_site("laptop"), environment={"PATH": "/usr/bin"})
    """

    site: Site
    environment: Mapping[str, str]
    """Of this process."""
    config: RunConfig | None = None
    run: Path | None = None
    """Folder of a run whose checkpoints are to be looked at."""
    tries_exchange: bool = True
    """Whether two processes are started that exchange over gloo; ranks of a launcher do so themselves."""


def gather(subject: Subject) -> Facts:
    """All facts of this node. Raises ConfigError for a run folder that is not there, LaunchError for a broken launcher."""
    if subject.run and not subject.run.is_dir():
        raise ConfigError(f"--run {subject.run}: no such folder; expected that of a run, such as runs/at_grpo")
    exchange = Exchange(subject.environment) if subject.tries_exchange else None
    place = find_place(subject.environment)
    problem, seconds = None, 0.0
    try:
        software, devices, host = _software(subject), _devices(), _host(subject)
        reaches = reach_all(subject.environment, subject.site.host_suffix)
    finally:
        if exchange:
            problem, seconds = exchange.result()
    return Facts(
        site=subject.site, environment=subject.environment, software=software, devices=devices, host=host, reaches=reaches,
        num_local_ranks=(place.local_size if place else None) or 1, exchange=problem, exchange_s=seconds,
        config=subject.config, uncached=_uncached(subject.config) if subject.config else None, caches=_caches(subject),
        run=str(subject.run or ""), saved=_saved(subject.run) if subject.run else (),
    )  # fmt: skip


# ---- software and devices


def _software(subject: Subject) -> Software:
    path = subject.environment.get("PATH", "")
    mpiexec = shutil.which("mpiexec", path=path) or shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or ""
    icpx = shutil.which("icpx", path=path) or ""
    try:
        library, problem = " ".join(mpi.library_version().split()), ""
    except LaunchError as error:
        library, problem = "", str(error.__cause__)
    return Software(
        versions={str(found.name).lower(): found.version for found in metadata.distributions() if found.name},
        requirements=tuple(metadata.requires(PROJECT) or ()), mpi_library=library, mpi_problem=problem, mpiexec=mpiexec,
        mpiexec_version=_ask(mpiexec, subject.environment), icpx_version=_ask(icpx, subject.environment),
    )  # fmt: skip


def _ask(program: str, environment: Mapping[str, str]) -> str:
    """What a program says of its version, or why it says nothing."""
    if not program:
        return ""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=_ASK_S,
            env=dict(environment), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer: {error}"
    return f"{done.stdout}\n{done.stderr}".strip()


def _devices() -> Devices:
    offer = find_offer()
    memory_gib = [
        torch.get_device_module(kind).get_device_properties(index).total_memory / 2**30  # type: ignore[attr-defined]
        for kind, count in offer.devices.items()
        for index in range(count)
    ]
    return Devices(torch=torch.__version__, offer=offer, memory_gib=tuple(memory_gib))


# ---- the host


def _host(subject: Subject) -> Host:
    temporary = Path(tempfile.gettempdir())
    runs = Path(subject.config.runs_dir if subject.config else "runs")
    rooms = [_room("runs_dir", runs), _room("temporary folder", temporary), _room("scratch", Path(subject.site.node.scratch))]
    if SHARED_MEMORY.is_dir():
        rooms.append(_room("shared memory", SHARED_MEMORY))
    nodes = Path("/sys/devices/system/node")
    home = Path.home()
    return Host(
        name=socket.gethostname(),
        cpus=tuple(sorted(os.sched_getaffinity(0))) if sys.platform != "darwin" else tuple(range(os.cpu_count() or 1)),
        num_cpus=os.cpu_count() or 1,
        free_memory_bytes=_free_memory(),
        numa_nodes=sum(1 for _ in nodes.glob("node[0-9]*")) if nodes.is_dir() else None,
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        max_core_bytes=resource.getrlimit(resource.RLIMIT_CORE)[0],
        rooms=tuple(rooms),
        temporary=subject.environment.get("TMPDIR") or str(temporary),
        modes={str(folder): folder.stat().st_mode & 0o777 for folder in (home, home / ".ssh") if folder.is_dir()},
    )


def _room(what: str, wanted: Path) -> Room:
    """Of the nearest folder that exists; a file is written there and removed."""
    folder = next(folder for folder in (wanted.absolute(), *wanted.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
        problem = ""
    except OSError as error:
        problem = error.strerror or str(error)
    return Room(what=what, path=str(folder), free_bytes=shutil.disk_usage(folder).free, problem=problem)


def _free_memory() -> int | None:
    """As Linux estimates it."""
    file = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text(encoding="utf-8")) if file.is_file() else None
    return int(match[1]) << 10 if match else None


# ---- models, caches, checkpoints


def _uncached(config: RunConfig) -> dict[str, str]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    paths = {"model.path": config.model.path, **{f"team.models.{name}": path for name, path in config.team.models.items()}}
    cache = Path(constants.HF_HUB_CACHE)
    return {
        key: path
        for key, path in paths.items()
        if path not in BUILT_IN
        and not Path(path).exists()
        and not any((cache / repo_folder_name(repo_id=path, repo_type="model") / "snapshots").glob("*"))
    }


def _caches(subject: Subject) -> dict[str, int]:
    """Number of files in the folder of vLLM's cache that holds what it has learnt of models."""
    home = subject.environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(subject.environment.get("VLLM_CACHE_ROOT") or Path(home) / "vllm")
    folder = root / "modelinfos"
    return {str(folder): sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0}


def _saved(run: Path) -> tuple[Saved, ...]:
    return tuple(
        Saved(name=folder.name, problems=tuple(_problems(folder)))
        for _, folder in checkpoint_files.folders(run / "checkpoints")
    )


def _problems(folder: Path) -> list[str]:
    """By marker and sizes alone: to read all files, as a resumed run does, takes minutes."""
    marker = checkpoint_files.read_marker(folder)
    if marker is None:
        return [f"no whole {checkpoint_files.MARKER}"]
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in marker.files}
    return [
        f"{name} is missing" if sizes[name] is None else f"{name} has {sizes[name]} bytes of {expected.num_bytes}"
        for name, expected in marker.files.items()
        if sizes[name] != expected.num_bytes
    ]
