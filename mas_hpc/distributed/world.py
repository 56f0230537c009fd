"""Who am I among the ranks. The only place that reads the environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore

from mas_hpc.distributed import mpi
from mas_hpc.distributed.device import Wanted, bind, bound_device, choose, find_offer
from mas_hpc.distributed.launchers import ATTEMPT, ELASTIC, LAUNCHERS, LOGS, SLURM, STORE, TORCHRUN, find_place, number
from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.watchdog import Watch
from mas_hpc.errors import LaunchError, LostPeerError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Ranks reach a collective that far apart at most: one may train or sample while others wait."""
MEETING_TIMEOUT = timedelta(minutes=5)
"""Ranks start, and leave, that far apart at most."""
VARIABLES = (
    "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TMPDIR", "ZE_FLAT_DEVICE_HIERARCHY",
    "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR", "CUDA_VISIBLE_DEVICES", "CCL_PROCESS_LAUNCHER", "CCL_ATL_TRANSPORT",
    "CCL_KVS_MODE", "CCL_OP_SYNC", "CCL_WORKER_AFFINITY", "FI_PROVIDER", "FI_MR_CACHE_MONITOR", "DS_ACCELERATOR", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "PBS_JOBID", "SLURM_JOB_ID",
)  # fmt: skip
"""Of interest beside those of launchers."""
CPU = torch.device("cpu")
_MAX_HOST_BYTES = 256
_GLOO = "gloo/transport"
"""In the path of the source that every error of a collective begins with; its type says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Rank and number of ranks, global and on this host.

    Example: World(rank=1, size=2, local_rank=1, local_size=2, launcher="torchrun")
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: Literal["torchrun", "mpi", "slurm", "none"] = "none"
    """Where ranks meet: all but those of mpi at MASTER_ADDR, unless a supervisor has a STORE for them."""
    attempt: int = 0
    """How often a supervisor has restarted the ranks."""
    hosts: tuple[str, ...] = ()
    """Host name of each rank, while connected; ranks of one name share memory."""
    store: Store | None = field(default=None, compare=False, repr=False)
    """Keys and values that all ranks of this attempt share, while connected; None for a world of one."""
    run_store: Store | None = field(default=None, compare=False, repr=False)
    """Those of all attempts: a restart finds what was set before it, where the launcher's agent hosts the store."""

    control: ProcessGroup | None = field(default=None, compare=False, repr=False)
    """Of gloo, while connected: what is not weights or gradients goes over it, whatever the device; None for a world of one."""
    group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    """Of weights and gradients, where these ranks are not all; None: the group of all ranks."""
    device: torch.device = CPU
    """What this rank computes on."""
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    """Where work says how far it has come."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @staticmethod
    def from_env() -> World:
        """The place that the launcher gave this process; without one, a world of one. Collective under an MPI launcher.

        Raises LaunchError when the ranks would not find each other: launcher and MPI library do not fit, or MPI is missing.
        """
        place = find_place(os.environ)
        if place is None or (place.size == 1 and place.launcher != TORCHRUN.name):
            return World(attempt=_attempt(ATTEMPT))
        if place.launcher == TORCHRUN.name:
            return World(
                rank=place.rank,
                size=place.size or 1,
                local_rank=place.local_rank or 0,
                local_size=place.local_size or 1,
                launcher="torchrun",
                attempt=_attempt("TORCHELASTIC_RESTART_COUNT"),
            )
        if place.launcher == SLURM.name and (STORE in os.environ or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
            return World(
                rank=place.rank, size=place.size or 1, local_rank=place.local_rank or 0, local_size=place.local_size or 1,
                launcher="slurm", attempt=_attempt(ATTEMPT),
            )  # fmt: skip
        ranks = mpi.join(place)
        local_rank, local_size = mpi.local_ranks(ranks)
        return World(
            rank=ranks.rank, size=ranks.size, local_rank=local_rank, local_size=local_size, launcher="mpi",
            attempt=_attempt(ATTEMPT),
        )  # fmt: skip


def _attempt(name: str) -> int:
    return number(os.environ, name) if name in os.environ else 0


def log_folder() -> Path | None:
    """Where ranks write their output; None: to whoever started them."""
    return Path(os.environ[LOGS]) if LOGS in os.environ else None


def tell_deepspeed(world: World, device: str) -> None:
    """Set what DeepSpeed reads of the environment when it is imported: a rank of its host, and the kind of device."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ["DS_ACCELERATOR"] = device


def launch_variables() -> dict[str, str]:
    """What the environment says about ranks, devices, threads and caches, by name; nothing that could be a secret."""
    told = {name for launcher in LAUNCHERS for name in launcher.variables} | {*ELASTIC, ATTEMPT, STORE, *VARIABLES}
    return {name: os.environ[name] for name in sorted(told) if name in os.environ}


def inherited() -> dict[str, str]:
    """The whole environment of this process, secrets included: for checks of it, and for programs that are started."""
    return dict(os.environ)


def attempt_store(host: Store, attempt: int) -> Store:
    """The part of the ranks' store that belongs to one start of them all."""
    return PrefixStore(f"attempt{attempt}", host)


def ranks_store(host: Store, attempt: int) -> Store:
    """World.store of the ranks of an attempt."""
    return PrefixStore("mas_hpc", attempt_store(host, attempt))


@contextmanager
def connected(world: World, device: Wanted = "cpu") -> Iterator[World]:
    """Join the other ranks for the duration of the block; yields the world with its store. One compute thread a rank.

    Raises LostPeerError when not all ranks arrive within MEETING_TIMEOUT, and for a collective that another rank does not
    finish; LaunchError when the store is not where it should be; what `choose` raises for the device.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread on shared cores is slower than none
    chosen = choose(device, find_offer(), local_rank=world.local_rank, local_size=world.local_size, size=world.size)
    bind(chosen)
    world = replace(world, device=chosen.device)
    if world.size == 1:
        yield replace(world, hosts=(socket.gethostname(),))
    else:
        store, by_agent = _open_store(world)
        attempt = attempt_store(store, world.attempt)
        _arrive(world, attempt)
        dist.init_process_group(
            chosen.group_backend, rank=world.rank, world_size=world.size, store=PrefixStore("group", attempt),
            timeout=COLLECTIVE_TIMEOUT, device_id=bound_device(chosen),
        )  # fmt: skip
        try:
            world = replace(world, control=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))
            shared, run_store = ranks_store(store, world.attempt), PrefixStore("run", store)
            yield replace(world, hosts=_gather_hosts(world), store=shared, run_store=run_store)
        except RuntimeError as error:
            if _GLOO not in str(error):
                raise
            raise _lost_another(world, str(error)) from error
        finally:
            dist.destroy_process_group()
        if not by_agent:
            _leave(world, attempt)
    if world.launcher == "mpi":
        mpi.finalize()


def _open_store(world: World) -> tuple[Store, bool]:
    """The store of all ranks, and whether the launcher's agent hosts it; otherwise rank 0 does."""
    if world.launcher != "torchrun" and STORE in os.environ:
        host, _, host_port = os.environ[STORE].rpartition(":")
        return _open_tcp_store(world, host, int(host_port), is_host=False), True
    if world.launcher == "mpi":
        return _open_agreed_store(world), False
    if "MASTER_ADDR" not in os.environ:
        raise LaunchError("MASTER_ADDR is not set beside RANK and WORLD_SIZE: start with torchrun, which sets all of them")
    by_agent = world.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], number(os.environ, "MASTER_PORT")
    return _open_tcp_store(world, address, port, is_host=world.is_first and not by_agent), by_agent


def _open_agreed_store(world: World) -> Store:
    """Rank 0 hosts it, at a free port and under MASTER_ADDR where that is set, and tells the others over MPI."""
    address = os.environ.get("MASTER_ADDR") or mpi.own_address(world.local_size, world.size)
    if world.local_size < world.size and (address == "localhost" or address.startswith("127.")):
        raise LaunchError(
            f"MASTER_ADDR={address}: {world.size} ranks on several hosts cannot meet there; unset it, or set it to a name of "
            "rank 0's host that the others reach"
        )
    hosted = _open_tcp_store(world, address, 0, is_host=True) if world.is_first else None
    address, port = mpi.agree_on_address(address, hosted.port if hosted else 0)
    return hosted or _open_tcp_store(world, address, port, is_host=False)


def _open_tcp_store(world: World, address: str, port: int, *, is_host: bool) -> TCPStore:
    try:
        return TCPStore(address, port, world.size, is_host, MEETING_TIMEOUT, wait_for_workers=False)
    except dist.DistError as error:
        raise LaunchError(
            f"rank {world.rank} of {world.size} cannot meet the others at {address}:{port} (MASTER_ADDR, MASTER_PORT): {error}"
        ) from error


def _arrive(world: World, attempt: Store) -> None:
    """Wait for all ranks, so that a missing one is named: the process group would only say that it timed out."""
    arrive(attempt, "start", world.rank)
    if missing := absent(attempt, "start", world.size, MEETING_TIMEOUT):
        raise LostPeerError(f"of {world.size} ranks, {missing} did not start within {MEETING_TIMEOUT} of rank {world.rank}")


def _leave(world: World, attempt: Store) -> None:
    """Say that this rank needs the store no more; rank 0, which hosts it, waits for the others."""
    arrive(attempt, "end", world.rank)
    if world.is_first and (missing := absent(attempt, "end", world.size, MEETING_TIMEOUT)):
        raise LostPeerError(f"ranks {missing} did not end within {MEETING_TIMEOUT} of rank 0, which hosts their store")


def _lost_another(world: World, error: str) -> LostPeerError:
    reason = error.partition("] ")[2].partition(". ")[0].rstrip(".")
    return LostPeerError(
        f"rank {world.rank} of {world.size} cannot go on: another rank has ended, or has not come to a collective within "
        f"{COLLECTIVE_TIMEOUT} ({reason}); look for the first error of the others, then start again"
    )


def _gather_hosts(world: World) -> tuple[str, ...]:
    name = socket.gethostname().encode()[:_MAX_HOST_BYTES]
    mine = torch.zeros(_MAX_HOST_BYTES, dtype=torch.uint8)
    mine[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    names = [torch.zeros_like(mine) for _ in range(world.size)]
    dist.all_gather(names, mine, group=world.control)
    return tuple(bytes(name.tolist()).rstrip(b"\0").decode() for name in names)
