"""The report of what is here can be pasted, names what clashes, keeps secrets, and has a line of every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mas_hpc.distributed.world import World, connected, launch_variables
from mas_hpc.phases.environment import as_text, conflicts, environment
from tests.distributed.launch import run_ranks


def test_one_process_reports_all_sections(tmp_path: Path) -> None:
    with connected(World(), "auto") as world:
        report = environment(world, "auto", tmp_path / "runs" / "deep")
    assert report["versions"]["torch"] == torch.__version__ and "python" in report["versions"]
    assert report["launcher"]["found"] == "none: 1 rank on 1 host(s)"
    assert report["device"]["chosen"].startswith("cpu (cpu: torch") and "gloo" in report["device"]["backends of torch"]
    assert report["kernels"]["torch"] == "can run" and report["kernels"]["chosen"].startswith("torch (")
    assert str(tmp_path / "runs" / "deep") in report["disk"]["runs_dir"] and "GiB free" in report["disk"]["runs_dir"]
    assert "local rank 0 of 1, cpu" in report["ranks"]["0"]
    json.dumps(report)
    lines = as_text(report).splitlines()
    assert lines[0] == "versions:" and f"- torch: {torch.__version__}" in lines


def test_only_variables_that_are_no_secret_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_TOKEN": "hf_secret", "PMI_RANK": "3", "ZE_AFFINITY_MASK": "0.1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    told = launch_variables()
    assert (told["PMI_RANK"], told["ZE_AFFINITY_MASK"], told["HF_HUB_OFFLINE"]) == ("3", "0.1", "1")
    assert not any("TOKEN" in name for name in told)


def test_packages_that_break_each_other_are_noted() -> None:
    assert conflicts({"mpich": "5", "torch": "2.13"}) == []
    two, triton, bindings = conflicts({"mpich": "5", "impi-rt": "1", "triton": "3", "triton-xpu": "3", "oneccl-bind-pt": "2.8"})
    assert two.startswith("mpich and impi-rt overwrite") and "triton-xpu" in triton and "xccl" in bindings


@pytest.mark.slow
def test_ranks_of_mpiexec_report_once_with_a_line_each() -> None:
    done = run_ranks("mpiexec", 2, "-m", "mas_hpc", "env", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["launcher"]["found"] == "mpi: 2 ranks on 1 host(s)" and report["launcher"]["PMI_SIZE"] == "2"
    assert [line.partition(", ")[2].partition(", cpu")[0] for line in report["ranks"].values()] == [
        "local rank 0 of 2", "local rank 1 of 2",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_device_that_is_missing_is_said_as_a_run_would_say_it() -> None:
    done = run_ranks("torchrun", 1, "-m", "mas_hpc", "env", "--device", "xpu")
    assert done.returncode != 0 and "error: distributed.device=xpu: torch" in done.stderr
