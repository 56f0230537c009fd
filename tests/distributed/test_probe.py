"""Collectives are measured on real ranks, wrong values are found, and a rank that does not come is named in bounded time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mas_hpc import exits
from mas_hpc.distributed.probe import COLLECTIVES, CollectiveTime, _sums, _values, measure_collectives
from mas_hpc.distributed.world import World
from tests.distributed.launch import run_ranks, run_supervised

RANKS = str(Path(__file__).with_name("probe_ranks.py"))


def measured(launcher: str, size: int, how: str) -> dict[str, Any]:
    done = run_ranks(launcher, size, RANKS, how)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    return json.loads(line.removeprefix("found "))


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "size"), [("torchrun", 2), ("mpiexec", 3)])
def test_every_collective_is_measured_and_right(launcher: str, size: int) -> None:
    found = measured(launcher, size, "right")
    times, least = found["times"], 4 * size
    assert [(time["collective"], time["bytes"]) for time in times] == [
        (name, size_bytes) for name in COLLECTIVES for size_bytes in (4 * size * -(-5 // least), least * -(-(1 << 14) // least))
    ]
    assert all(time["correct"] and time["ranks"] == size and 0.0 < time["seconds"] < 1.0 for time in times)
    assert found["speed"]["dtype"] == "float32" and found["speed"]["gemm_tflops"] > 0.001
    assert found["speed"]["memory_gb_per_s"] > 0.1


@pytest.mark.slow
def test_wrong_values_on_one_rank_are_known_to_all() -> None:
    times = measured("torchrun", 3, "wrong")["times"]
    assert {time["collective"] for time in times if not time["correct"]} == {"all_reduce"}


def test_a_rank_that_does_not_come_is_named_to_the_others() -> None:
    survivors = run_supervised(3, 0, RANKS, "absent", survivors=2)
    for code, output in survivors:
        assert code == exits.LOST_PEER, output
        assert "error: broadcast of 12 bytes: rank 2 on " in output and "did not come to it within 0:00:02" in output


def test_sums_of_many_ranks_are_those_of_their_values() -> None:
    here = torch.device("cpu")
    assert _values(2, 4, here).tolist() == [14.0, 15.0, 16.0, 17.0]
    assert torch.equal(_sums(100, 70, here), sum(_values(rank, 70, here) for rank in range(100)))


def test_bandwidth_of_a_bus_counts_what_a_link_carries() -> None:
    # 4 ranks, 8 MB in 1 ms: a ring carries 2 * 3/4 of the vector of an all-reduce over each link, 3/4 of an all-gather's
    times = {
        name: CollectiveTime(collective=name, bytes=8_000_000, ranks=4, seconds=1e-3, correct=True) for name in COLLECTIVES
    }
    assert times["all_reduce"].bus_gb_per_s == pytest.approx(12.0)
    assert times["all_gather"].bus_gb_per_s == pytest.approx(6.0)
    assert times["send_far"].bus_gb_per_s == pytest.approx(8.0)


def test_one_rank_has_no_collectives() -> None:
    assert measure_collectives(World()) == ()
