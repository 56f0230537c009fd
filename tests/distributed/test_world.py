"""A rank that is missing or fails is named to the others, and they can leave: nothing hangs, nothing crashes at the end."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from mas_hpc.distributed import world as world_module
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import LaunchError
from tests.distributed.launch import run_ranks, run_supervised

FAILING = str(Path(__file__).with_name("failing_ranks.py"))
FAILS = """
import sys, time
from mas_hpc.distributed.world import World, connected
with connected(World.from_env()) as world:
    if world.rank == 1:
        sys.exit("the first error")
    time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when", "why"),
    [("dies", "after", "broken down"), ("stops", "after", "has not taken a message"), ("dies", "before", "did not open")],
)
def test_survivors_name_the_failed_rank_and_leave(how: str, when: str, why: str) -> None:
    survivors = run_supervised(3, 1, FAILING, how, when, survivors=2)
    for rank, (code, output) in enumerate(survivors):
        assert code == 0, output
        [error] = [line for line in output.splitlines() if line.startswith("error: ")]
        assert error.startswith("error: rank 2 on ") and why in error
        assert f"rank {rank} has left attempt 1" in output


DIES = """
import os, sys
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import LaunchError
try:
    with connected(World.from_env()) as world:
        if world.rank == 1:
            os._exit(1)
        gather_lines(world, ["mine"])
except LaunchError as error:
    sys.exit(f"error: {error}")
"""


def test_a_rank_that_another_leaves_in_a_collective_says_so_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    [(code, output)] = run_supervised(2, 0, str(script), survivors=1)
    assert code == 1
    assert output.startswith("error: rank 0 of 2 cannot go on: another rank has ended") and output.count("\n") == 1


@pytest.mark.slow
def test_a_rank_that_fails_under_mpiexec_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = run_ranks("mpiexec", 2, str(script))
    assert done.returncode != 0 and "the first error" in done.stderr


def test_a_rank_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world_module, "MEETING_TIMEOUT", timedelta(seconds=0.5))
    with pytest.raises(LaunchError, match=r"of 2 ranks, \[1\] did not start"), connected(World(size=2, launcher="torchrun")):
        raise AssertionError("connected without rank 1")


def test_a_store_that_nobody_hosts_is_an_error_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world_module, "MEETING_TIMEOUT", timedelta(seconds=0.5))
    with (
        pytest.raises(LaunchError, match=r"127\.0\.0\.1:1 \(MASTER_ADDR"),
        connected(World(rank=1, size=2, launcher="torchrun")),
    ):
        raise AssertionError("connected without a store")
