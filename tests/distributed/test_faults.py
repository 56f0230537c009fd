"""The real job on two ranks under the supervisor, disturbed in the middle: every task once, with the tokens of one rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mas_hpc.data import trace_store

ROOT = Path(__file__).parents[2]
NUM_TASKS = 160
SMALL = (
    "warm_start=null", "data.num_train=4", f"data.num_test={NUM_TASKS}", f"rollout.num_tasks={NUM_TASKS}",
    "rollout.max_rows=8", "model.hidden_size=64", "model.num_heads=4",
)  # fmt: skip
PROGRESS = 8
"""Traces of a rank that show that it is in the middle."""


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return [sys.executable, "-m", "mas_hpc", *arguments], {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def answers(folder: Path) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    traces = [trace for file in (folder / "traces").glob("rollout*.jsonl") for trace in trace_store.read(file)]
    return sorted((trace.task.id, tuple(turn.completion_ids for turn in trace.turns)) for trace in traces)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    folder = tmp_path_factory.mktemp("one")
    line, environment = command("rollout", str(ROOT / "configs" / "quickstart.yaml"), *SMALL, f"runs_dir={folder}", "name=run")
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)
    return answers(folder / "run")


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def disturbed(folder: Path, rank: int, number: signal.Signals, *words: str) -> tuple[int, str]:
    """Exit code of the launch, and what it said, when a rank gets a signal after PROGRESS traces."""
    writes = 0 if words else rank  # of ranks that share layers
    said, traces = folder / "stderr", folder / "run" / "traces" / f"rollout.rank{writes}.jsonl"
    line, environment = command(
        "launch", "--local", "-n", "2", "--job", "rollout", str(ROOT / "configs" / "quickstart.yaml"), *SMALL,
        f"runs_dir={folder}", "name=run", "rollout.stall_s=4", *words,
    )  # fmt: skip
    with said.open("w") as errors:
        supervisor = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            wait_for(lambda: traces.is_file() and trace_store.count(traces) >= PROGRESS, f"no progress: {said.read_text()}")
            pids = re.findall(r"ranks are processes (.*)", said.read_text())[0].split()
            os.kill(int(pids[rank]), number)
            code = supervisor.wait(timeout=240)
        finally:
            if supervisor.poll() is None:
                supervisor.terminate()
                supervisor.wait(timeout=60)
    return code, said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "says", "attempts", "words"),
    [
        (1, signal.SIGKILL, "rank 1 died of SIGKILL; the others take its work over", 1, ()),
        (0, signal.SIGKILL, "rank 0 died of SIGKILL; all ranks start again", 2, ()),
        (1, signal.SIGSTOP, "rank 1 is ended: no sign of life for|ranks [1] did not end", 1, ()),
        (0, signal.SIGSTOP, "rank 0 is ended: no sign of life for", 2, ()),
        (1, signal.SIGKILL, "rank 1 died of SIGKILL; all ranks start again", 2, ("distributed.tensor_parallel=2",)),
    ],
    ids=["kill another", "kill the first", "stop another", "stop the first", "kill one that shares layers"],
)
def test_every_task_is_there_once_with_the_tokens_of_an_undisturbed_run(  # type: ignore[no-untyped-def]
    undisturbed, tmp_path: Path, rank: int, number: signal.Signals, says: str, attempts: int, words: tuple[str, ...]
) -> None:
    code, said = disturbed(tmp_path, rank, number, *words)
    assert code == 0, said
    assert any(one in said for one in says.split("|"))
    assert said.count("ranks are processes") == attempts
    found = answers(tmp_path / "run")
    assert len({task for task, _ in found}) == NUM_TASKS
    assert found == undisturbed
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["run"]
    assert (tmp_path / "run" / "report.html").is_file()
