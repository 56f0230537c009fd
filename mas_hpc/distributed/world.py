"""Who am I among the ranks. The only place that reads the environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from mas_hpc.distributed import mpi
from mas_hpc.distributed.launchers import TORCHRUN, find_place, number
from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.errors import LaunchError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Ranks reach a collective that far apart at most: one may train or sample while others wait."""
MEETING_TIMEOUT = timedelta(minutes=5)
"""Ranks start, and leave, that far apart at most."""
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
    launcher: Literal["torchrun", "mpi", "none"] = "none"
    attempt: int = 0
    """How often a supervisor has restarted the ranks."""
    hosts: tuple[str, ...] = ()
    """Host name of each rank, while connected; ranks of one name share memory."""
    store: Store | None = field(default=None, compare=False, repr=False)
    """Keys and values that all ranks of this attempt share, while connected; None for a world of one."""
    run_store: Store | None = field(default=None, compare=False, repr=False)
    """Those of all attempts: a restart finds what was set before it, where the launcher's agent hosts the store."""

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
            return World()
        if place.launcher == TORCHRUN.name:
            return World(
                rank=place.rank,
                size=place.size or 1,
                local_rank=place.local_rank or 0,
                local_size=place.local_size or 1,
                launcher="torchrun",
                attempt=number(os.environ, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0,
            )
        ranks = mpi.join(place)
        local_rank, local_size = mpi.local_ranks(ranks)
        return World(rank=ranks.rank, size=ranks.size, local_rank=local_rank, local_size=local_size, launcher="mpi")


def attempt_store(host: Store, attempt: int) -> Store:
    """The part of the ranks' store that belongs to one start of them all."""
    return PrefixStore(f"attempt{attempt}", host)


def ranks_store(host: Store, attempt: int) -> Store:
    """World.store of the ranks of an attempt."""
    return PrefixStore("mas_hpc", attempt_store(host, attempt))


@contextmanager
def connected(world: World) -> Iterator[World]:
    """Join the other ranks for the duration of the block; yields the world with its store. One compute thread a rank.

    Raises LaunchError when not all ranks arrive within MEETING_TIMEOUT, and for a collective that another rank does not finish.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread on shared cores is slower than none
    if world.size == 1:
        yield replace(world, hosts=(socket.gethostname(),))
    else:
        store, by_agent = _open_store(world)
        attempt = attempt_store(store, world.attempt)
        _arrive(world, attempt)
        group_store = PrefixStore("group", attempt)
        dist.init_process_group("gloo", rank=world.rank, world_size=world.size, store=group_store, timeout=COLLECTIVE_TIMEOUT)
        try:
            hosts = _gather_hosts(world)
            yield replace(world, hosts=hosts, store=ranks_store(store, world.attempt), run_store=PrefixStore("run", store))
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
    if world.launcher == "mpi":
        return _open_agreed_store(world), False
    if "MASTER_ADDR" not in os.environ:
        raise LaunchError("MASTER_ADDR is not set beside RANK and WORLD_SIZE: start with torchrun, which sets all of them")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], number(os.environ, "MASTER_PORT")
    return _open_tcp_store(world, address, port, is_host=world.is_first and not by_agent), by_agent


def _open_agreed_store(world: World) -> Store:
    """Rank 0 hosts it, at a free port and under MASTER_ADDR where that is set, and tells the others over MPI."""
    address = os.environ.get("MASTER_ADDR") or mpi.own_address(world.local_size, world.size)
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
        raise LaunchError(f"of {world.size} ranks, {missing} did not start within {MEETING_TIMEOUT} of rank {world.rank}")


def _leave(world: World, attempt: Store) -> None:
    """Say that this rank needs the store no more; rank 0, which hosts it, waits for the others."""
    arrive(attempt, "end", world.rank)
    if world.is_first and (missing := absent(attempt, "end", world.size, MEETING_TIMEOUT)):
        raise LaunchError(f"ranks {missing} did not end within {MEETING_TIMEOUT} of rank 0, which hosts their store")


def _lost_another(world: World, error: str) -> LaunchError:
    reason = error.partition("] ")[2].partition(". ")[0].rstrip(".")
    return LaunchError(
        f"rank {world.rank} of {world.size} cannot go on: another rank has ended, or has not come to a collective within "
        f"{COLLECTIVE_TIMEOUT} ({reason}); look for the first error of the others, then start again"
    )


def _gather_hosts(world: World) -> tuple[str, ...]:
    name = socket.gethostname().encode()[:_MAX_HOST_BYTES]
    mine = torch.zeros(_MAX_HOST_BYTES, dtype=torch.uint8)
    mine[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    names = [torch.zeros_like(mine) for _ in range(world.size)]
    dist.all_gather(names, mine)
    return tuple(bytes(name.tolist()).rstrip(b"\0").decode() for name in names)
