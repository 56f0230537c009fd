"""One of two ranks under the watchdog, which get nowhere as they are told. Run by test_watchdog.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mas_hpc.distributed.watchdog import watching
from mas_hpc.distributed.world import World, connected

HANG_S = 2.0
FOR_EVER_S = 60.0


def collective_that_nobody_joins() -> None:
    dist.all_reduce(torch.zeros(1))


def behave(case: str, world: World) -> None:
    first = world.is_first
    if case == "hangs":
        time.sleep(FOR_EVER_S) if first else collective_that_nobody_joins()
    elif case == "stops":
        time.sleep(HANG_S / 2)
        os.kill(os.getpid(), signal.SIGSTOP) if first else collective_that_nobody_joins()
    elif case == "waits for one that works":
        for step in range(20) if first else ():
            time.sleep(HANG_S / 8)
            world.watch.at("report", step)
        dist.barrier()
    elif case == "keeps Python's lock":
        ctypes.PyDLL(None).sleep(int(FOR_EVER_S))


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    with connected(World.from_env()) as ranks, watching(ranks, hang_s=HANG_S, stall_s=HANG_S) as world:
        world.watch.opened(folder)
        world.watch.at("train", 7)
        behave(case, world)
