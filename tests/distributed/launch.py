"""Real ranks for tests: a script of ours under torchrun, under mpiexec, or under a supervisor's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
MPIEXEC = Path(sys.executable).with_name("mpiexec")
TIMEOUT_S = 120
"""For ranks that hang; the tests take a small part of it."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(extra or {})}


def launcher(name: str, size: int) -> list[str]:
    """The command that starts `size` ranks of what follows it, a script or -m and a module."""
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
    return [str(MPIEXEC), "-n", str(size), sys.executable]


def run_ranks(name: str, size: int, *words: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run to the end and return the output of all ranks together."""
    return subprocess.run(
        [*launcher(name, size), *words], capture_output=True, text=True, check=False, timeout=timeout_s, env=environment()
    )


def run_supervised(size: int, attempt: int, *words: str, survivors: int) -> list[tuple[int, str]]:
    """Ranks of a supervisor that hosts their store; code and output of the first `survivors`, then the others are ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment({**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks[:survivors]]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=False)]
