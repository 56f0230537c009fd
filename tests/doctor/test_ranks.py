"""Ranks look together: on real ones, all is well or the fault and its rank are named; what is wrong with places is pure."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mas_hpc import exits
from mas_hpc.distributed.probe import COLLECTIVES, CollectiveTime, DeviceSpeed
from mas_hpc.doctor.placement import RankPlace, check_places
from mas_hpc.doctor.ranks import bandwidths, merge
from mas_hpc.doctor.trials import judge_collectives, judge_speeds
from mas_hpc.launch.finding import Finding
from mas_hpc.launch.site import load_site
from tests.distributed.launch import MPIEXEC, environment, run_ranks, run_supervised

FAULTY = str(Path(__file__).with_name("doctor_ranks.py"))
DOCTOR = ("-m", "mas_hpc", "doctor", "--mpi")


def told(output: str) -> dict[str, Any]:
    """The report among other output."""
    return json.loads(output[output.index("{") : output.rindex("}") + 1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_real_ranks_find_nothing_wrong(launcher: str) -> None:
    done = run_ranks(launcher, 2, *DOCTOR, "--json", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = told(done.stdout)
    verdicts = {finding["name"]: finding["verdict"] for finding in report["findings"]}
    trials = (
        "waits",
        "collectives",
        "FSDP2",
        "weights (group)",
        "weights (auto)",
        "devices of ranks",
        "local ranks",
        "versions",
    )
    assert [verdicts[name] for name in trials] == ["ok"] * len(trials)
    assert "error" not in verdicts.values() and verdicts["leak"] == "skipped"
    assert [(place["rank"], place["local_rank"]) for place in report["ranks"]] == [(0, 0), (1, 1)]
    assert len(report["collectives"]) == 4 * len(COLLECTIVES) and all(time["correct"] for time in report["collectives"])
    assert len(report["devices"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    (os.cpu_count() or 1) < 2 or shutil.which("taskset") is None, reason="two cores, and taskset to bind to them"
)
def test_ranks_that_are_bound_to_one_core_are_found() -> None:
    words = ["taskset", "-c"], [sys.executable, *DOCTOR, "--json"]
    command = [str(MPIEXEC), "-n", "1", *words[0], "0,1", *words[1], ":", "-n", "1", *words[0], "1", *words[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment())
    assert done.returncode != 0, done.stdout
    findings = {finding["name"]: finding for finding in told(done.stdout)["findings"]}
    assert (
        findings["cores of ranks"]["verdict"] == "error" and "core 1 is of ranks 0, 1" in findings["cores of ranks"]["evidence"]
    )


@pytest.mark.slow
def test_wrong_sums_of_one_rank_are_an_error_of_all() -> None:
    done = run_ranks("torchrun", 2, FAULTY, "wrong", timeout_s=300)
    assert done.returncode != 0
    findings = {finding["name"]: finding for finding in told(done.stdout)["findings"]}
    assert findings["collectives"]["verdict"] == "error"
    assert findings["collectives"]["evidence"].startswith("wrong values: all_reduce of 1024 bytes; all_reduce of 32768")


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_and_nobody_waits_on() -> None:
    [(code, output)] = run_supervised(2, 0, FAULTY, "late", survivors=1)
    assert code == exits.LOST_PEER, output
    assert "did not come to collectives within 0:00:08 of rank 0" in output and "error: rank 1 on " in output
    assert told(output)["findings"][-1]["name"] == "ranks"


def place(rank: int, **changes: Any) -> RankPlace:
    """Of a node of Aurora, well bound."""
    first = 4 + 5 * rank
    healthy = RankPlace(
        rank=rank, host="x1", local_rank=rank, device=f"xpu:{rank}", uuid=f"u{rank}", cpus=tuple(range(first, first + 4)),
        num_cpus=208, threads=4, torch="2.10.0", python="3.12.12",
    )  # fmt: skip
    return replace(healthy, **changes)


def wrong(places: list[RankPlace]) -> dict[str, tuple[str, str]]:
    findings = check_places(places, load_site("aurora").node)
    return {
        finding.name: (finding.verdict, finding.evidence) for finding in findings if finding.verdict not in ("ok", "skipped")
    }


def test_ranks_with_places_of_their_own_are_well() -> None:
    assert wrong([place(0), place(1), place(2)]) == {}
    assert wrong([place(0), replace(place(0), rank=1, host="x2")]) == {}


@pytest.mark.parametrize(
    ("change", "name", "verdict", "evidence"),
    [
        ({"uuid": "u0"}, "devices of ranks", "error", "x1: ranks 0, 1 on device u0"),
        ({"local_rank": 0}, "local ranks", "error", "x1: ranks 0, 1 are all local rank 0"),
        ({"cpus": (7, 8, 9, 10), "threads": 3}, "cores of ranks", "error", "x1: core 7 is of ranks 0, 1"),
        ({"cpus": (51, 52, 53, 54)}, "reserved cores", "error", "ranks 1 may run on 0, 52, 104, 156"),
        ({"threads": 9}, "threads of ranks", "warning", "x1: 13 threads of 2 ranks on 8 cores"),
        ({"torch": "2.8.0"}, "same software", "error", "torch 2.10.0, python 3.12.12 on x1; torch 2.8.0, python 3.12.12 on x1"),
    ],
)
def test_a_second_rank_in_a_wrong_place_is_found(change: dict[str, Any], name: str, verdict: str, evidence: str) -> None:
    assert wrong([place(0), place(1, **change)]) == {name: (verdict, evidence)}


def test_ranks_that_share_one_mask_were_not_bound() -> None:
    cores = tuple(range(1, 52))
    assert wrong([place(0, cpus=cores), place(1, cpus=cores)]) == {}


def test_what_is_wrong_on_other_hosts_stands_beside_what_the_first_has_found() -> None:
    fine = Finding(name="disk", verdict="ok", evidence="100 GiB")
    full = Finding(name="disk", verdict="error", evidence="0 GiB", remedy="make room")
    ports = Finding(name="ports", verdict="ok", evidence="reached")
    assert merge([("a", fine), ("a", ports)]) == [fine, ports]
    both = merge([("a", fine), ("a", ports), ("b", full), ("c", full)])
    assert [(one.name, one.verdict, one.evidence) for one in both] == [
        ("disk", "error", "b; c: 0 GiB"), ("disk", "ok", "100 GiB"), ("ports", "ok", "reached"),
    ]  # fmt: skip


def test_a_slow_device_is_named() -> None:
    fast = DeviceSpeed(device="xpu:0", dtype="bfloat16", gemm_tflops=200.0, memory_gb_per_s=1000.0)
    assert judge_speeds([fast, fast, fast], ["x1", "x1", "x2"]).verdict == "ok"
    finding = judge_speeds([fast, fast, replace(fast, gemm_tflops=90.0)], ["x1", "x1", "x2"])
    assert finding.verdict == "warning" and finding.evidence.startswith("rank 2 on x2: 90 TFLOP/s, 1e+03 GB/s; 200 TFLOP/s")


def test_times_are_a_row_a_collective_and_a_column_a_size() -> None:
    times = [
        CollectiveTime(collective=name, bytes=size, ranks=2, seconds=1e-3, correct=True)
        for name in ("broadcast", "all_reduce")
        for size in (1024, 1 << 20)
    ]
    assert judge_collectives(times, "cpu").evidence == "2 collectives on cpu, right at 2 sizes"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bandwidths(times))
    text = console.export_text()
    assert "1 KiB" in text and "1 MiB" in text and "1.05 GB/s" in text and "all_reduce" in text
