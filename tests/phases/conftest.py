"""Finished runs of a tiny team, opened again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mas_hpc.cli import app
from mas_hpc.distributed.world import World
from mas_hpc.run import Run, reopen

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
NUM_TASKS = 8
SMALL = (
    "model.hidden_size=32", "model.num_heads=2", "data.num_digits=3", "data.num_train=12", f"data.num_test={NUM_TASKS}",
    f"rollout.num_tasks={NUM_TASKS}", "warm_start.steps=2", "warm_start.batch_size=4", "team.stop_when_accepted=false",
)  # fmt: skip


def rollout(runs: Path, name: str, *words: str) -> Path:
    """The folder of a rollout by the command line."""
    app(["rollout", QUICKSTART, *SMALL, *words, f"runs_dir={runs}", f"name={name}"], standalone_mode=False)
    return runs / name


def opened(folder: Path, world: World | None = None) -> Run:
    """As a command reopens it, without a word."""
    return reopen(folder, world or World(), Console(quiet=True))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rollouts are made."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def finished(runs: Path) -> Path:
    """A rollout of the tiny model; nobody writes to it."""
    return rollout(runs, "finished")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to write to."""
    return shutil.copytree(finished, tmp_path / "run")
