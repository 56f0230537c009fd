"""Two processes of this node that exchange over gloo, as ranks do: a trial in which every wait ends.

As a module it is one of the two: python -m mas_hpc.doctor.exchange
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from mas_hpc.distributed.launchers import ELASTIC
from mas_hpc.doctor.network import free_port

TIMEOUT_S = 90.0
"""For both together; they take some seconds, most of them to import torch."""


class Exchange:
    """The two processes, which run while the doctor looks at other things.

    Example: problem, seconds = Exchange(environment).result()
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._start = time.monotonic()
        port = str(free_port())
        inherited = {name: value for name, value in environment.items() if name not in ELASTIC}  # they host their store
        place = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "mas_hpc.doctor.exchange"],
                env={**inherited, **place, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            )
            for rank in ("0", "1")
        ]  # fmt: skip

    def result(self, timeout_s: float = TIMEOUT_S) -> tuple[str, float]:
        """What went wrong, empty when nothing did, and how long it took from the start."""
        problems = []
        try:
            for number, rank in enumerate(self._ranks):
                left_s = timeout_s - (time.monotonic() - self._start)
                try:
                    _, said = rank.communicate(timeout=max(left_s, 0.1))
                except subprocess.TimeoutExpired:
                    problems.append(f"rank {number} has not ended within {timeout_s:g} s")
                    continue
                if rank.returncode:
                    problems.append(f"rank {number}: {(said.strip().splitlines() or ['no message'])[-1]}")
        finally:
            for rank in self._ranks:
                rank.kill()
                rank.wait()
        return "; ".join(problems), time.monotonic() - self._start


def main() -> None:
    """One of the two: say who I am, hear both."""
    from mas_hpc.distributed.exchange import gather_lines
    from mas_hpc.distributed.world import World, connected

    with connected(World.from_env()) as world:
        heard = gather_lines(world, [f"rank {world.rank}"])
    if heard != ["rank 0", "rank 1"]:
        sys.exit(f"heard {heard} of rank 0 and rank 1")


if __name__ == "__main__":
    main()
