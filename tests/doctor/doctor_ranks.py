"""mas-hpc doctor --mpi, with a fault of the last rank. argv: wrong (its sums), or late (for the collectives)."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from mas_hpc import cli
from mas_hpc.distributed.world import World, inherited
from mas_hpc.doctor import ranks


def spoil(world: World) -> None:
    """On a bad link the last number is another."""
    right = dist.all_reduce

    def wrong(tensor: torch.Tensor, *args: object, **options: object) -> object:
        if options.get("group") is None:
            tensor[-1] += 1.0
        return right(tensor, *args, **options)

    dist.all_reduce = wrong


def main(fault: str) -> None:
    come = ranks._come
    is_last = inherited()["RANK"] == "1"

    def come_with_a_fault(world: World, name: str) -> None:
        if name == "collectives" and fault == "late":
            ranks.MEETING = timedelta(seconds=8)
            if is_last:
                time.sleep(1000)
        if name == "collectives" and fault == "wrong" and is_last:
            spoil(world)
        come(world, name)

    ranks._come = come_with_a_fault
    sys.argv = ["mas-hpc", "doctor", "--mpi", "--json"]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1])
