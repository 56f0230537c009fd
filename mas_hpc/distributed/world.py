"""Who am I among the ranks. The only place that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mas_hpc.errors import LaunchError

TIMEOUT = timedelta(minutes=30)
_OTHER_LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Rank and number of ranks, global and on this host.

    Example: World(rank=1, size=2, local_rank=1, local_size=2)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @staticmethod
    def from_env() -> World:
        """Read torchrun's variables; without them, a world of one.

        Raises LaunchError under a launcher whose ranks would each believe to be alone.
        """
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return World(
                rank=int(os.environ["RANK"]),
                size=int(os.environ["WORLD_SIZE"]),
                local_rank=int(os.environ.get("LOCAL_RANK", "0")),
                local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            )
        for name in _OTHER_LAUNCHERS:
            if int(os.environ.get(name, "1")) > 1:
                raise LaunchError(
                    f"{name}={os.environ[name]}: ranks of this launcher are not supported; "
                    "start with: torchrun --nproc_per_node N -m mas_hpc ..."
                )
        return World()


@contextmanager
def connected(world: World) -> Iterator[World]:
    """Join the process group for the duration of the block; one compute thread a rank."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread on shared cores is slower than none
    if world.size == 1:
        yield world
        return
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()
