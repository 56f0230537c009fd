"""Ranks that measure their collectives, the last of them in the way that the first argument says: right, wrong or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from mas_hpc import exits
from mas_hpc.distributed.probe import measure_collectives, measure_device
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import LostPeerError


def spoil_sums() -> None:
    """This rank's part of a sum is another than it should be, as on a bad link."""
    right = dist.all_reduce

    def wrong(tensor: object, *args: object, **options: object) -> object:
        if not options.get("group"):
            tensor[-1] += 1.0  # type: ignore[index]
        return right(tensor, *args, **options)

    dist.all_reduce = wrong


def main(how: str) -> None:
    with connected(World.from_env()) as world:
        if world.rank == world.size - 1:
            if how == "absent":
                time.sleep(60)
            if how == "wrong":
                spoil_sums()
        try:
            times = measure_collectives(world, (5, 1 << 14), repeats=3, timeout=timedelta(seconds=2 if how == "absent" else 30))
        except LostPeerError as error:
            print(f"error: {error}", flush=True)
            os._exit(exits.LOST_PEER)  # to leave the group would wait for the one that is lost
        speed = measure_device(world, repeats=1)
        if world.is_first:
            found = [dataclasses.asdict(time) | {"bus_gb_per_s": time.bus_gb_per_s} for time in times]
            print("found", json.dumps({"times": found, "speed": dataclasses.asdict(speed)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
