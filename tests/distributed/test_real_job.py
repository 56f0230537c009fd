"""The command line on two ranks of each launcher plays the same episodes as on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mas_hpc.data import trace_store
from mas_hpc.types import Turn
from tests.distributed.launch import ROOT, TIMEOUT_S, environment, launcher

NUM_TASKS = 8
SMALL = (
    "rollout", str(ROOT / "configs" / "quickstart.yaml"), "warm_start=null", "model.hidden_size=32", "data.num_train=4",
    "data.num_test=10", f"rollout.num_tasks={NUM_TASKS}",
)  # fmt: skip


def turns_by_id(start: list[str], folder: Path) -> dict[str, Turn]:
    """Play and read the traces; each task must be there once."""
    done = subprocess.run(
        [*start, "-m", "mas_hpc", *SMALL, f"runs_dir={folder}"], capture_output=True, text=True, check=False,
        timeout=TIMEOUT_S, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((folder / "quickstart" / "traces").glob("rollout*.jsonl"))
    traces = [trace for file in files for trace in trace_store.read(file)]
    assert len({trace.task.id for trace in traces}) == len(traces) == NUM_TASKS
    return {turn.id: turn for trace in traces for turn in trace.turns}


@pytest.mark.slow
def test_two_ranks_of_each_launcher_sample_what_one_samples(tmp_path: Path) -> None:
    alone = turns_by_id([sys.executable], tmp_path / "alone")
    for name in ("torchrun", "mpiexec"):
        together = turns_by_id(launcher(name, 2), tmp_path / name)
        assert together.keys() == alone.keys()
        for turn_id, turn in alone.items():
            assert together[turn_id].completion_ids == turn.completion_ids, (name, turn_id)
            assert together[turn_id].behavior_logprobs == pytest.approx(turn.behavior_logprobs, abs=1e-5)
