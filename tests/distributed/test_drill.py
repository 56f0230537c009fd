"""A training run of two ranks that is disturbed ends as if it had not been: the short form of benchmarks/drill.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import ROOT, launcher

sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import each other as scripts do

from drill import Fault, Outcome, differences, draw_faults, plan_in, run, times

STEPS = 12
FAULTS = tuple(
    Fault(number=number, kind=kind, rank=number % 2, step=2 * number + 1, delay=0.5)
    for number, kind in enumerate(("SIGKILL", "exception", "corrupted", "SIGSTOP"))
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(tmp_path_factory.mktemp("undisturbed") / "a", "torchrun", (), steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("starter", "faults"), [("torchrun", FAULTS), ("mpiexec", FAULTS[:2])], ids=["torchrun", "mpiexec"])
def test_a_disturbed_run_ends_with_the_weights_and_traces_of_an_undisturbed_one(
    undisturbed: Outcome, tmp_path: Path, starter: str, faults: tuple[Fault, ...]
) -> None:
    disturbed = run(tmp_path / "b", starter, faults, steps=STEPS)
    assert differences(disturbed, undisturbed) == []
    assert sorted(times(disturbed)) == sorted(fault.kind for fault in faults)
    assert len(disturbed.restarts) == len(faults)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_by_itself_and_they_go_on(undisturbed: Outcome, tmp_path: Path) -> None:
    killed = Fault(number=0, kind="SIGKILL", rank=0, step=3, delay=0.5)
    config, plan = plan_in(tmp_path, [killed], steps=STEPS)
    line = [*launcher("torchrun", 2), str(ROOT / "benchmarks" / "drill_rank.py"), "train", str(config)]
    line[3:3] = ["--max-restarts", "3"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DRILL_PLAN": str(plan)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train: goes on after step" in done.stdout
    ours, theirs = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (tmp_path, undisturbed.folder))
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []


def test_faults_are_the_same_for_a_seed_and_of_every_kind() -> None:
    faults = draw_faults(20, seed=3)
    assert faults == draw_faults(20, seed=3) != draw_faults(20, seed=4)
    assert {fault.kind for fault in faults} == {"SIGKILL", "SIGSTOP", "exception", "full disk", "truncated", "corrupted"}
    assert [fault.step for fault in faults] == list(range(2, 42, 2))
