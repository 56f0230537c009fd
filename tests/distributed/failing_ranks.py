"""One of three ranks, of which the last fails as it is told. Run by test_world.py under the variables of a supervisor."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.transport import Transport, open_transport
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import RolloutError

FAILS = 2
TIMEOUT_S = 2
DEADLINE_S = 60


def fail(how: str) -> None:
    """Die, or stop, as a node does; a stopped rank is ended by the test."""
    os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)


def use(transport: Transport) -> None:
    """Send to the failed rank, which may take some before it fails, until an error says that it takes no more."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        transport.send(FAILS, b"x" * 100_000)
        transport.receive()
        time.sleep(0.05)


if __name__ == "__main__":
    how, when = sys.argv[1:]
    with connected(World.from_env()) as world:
        if when == "before" and world.rank == FAILS:
            fail(how)
        try:
            transport = open_transport(world, timeout_s=TIMEOUT_S)
            if world.rank == FAILS:
                fail(how)
            use(transport)
        except RolloutError as error:
            print(f"error: {error}", flush=True)
        assert world.store is not None
        arrive(world.store, "seen", world.rank)  # a survivor that left at once would be another failed rank to the other
        assert absent(world.store, "seen", FAILS, timedelta(seconds=DEADLINE_S)) == []
    print(f"rank {world.rank} has left attempt {world.attempt}", flush=True)
