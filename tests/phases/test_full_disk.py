"""A disk that is full while a checkpoint is written: one message, and the run goes on from the checkpoint before it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mas_hpc.errors import CheckpointError
from tests.phases.resuming import assert_same_run, train

MESSAGE = r"train_step_4\.unfinished: cannot write the checkpoint: rank 0: .*; the checkpoints before it are as they were"


def checkpoints(runs: Path) -> Path:
    return runs / "sft" / "checkpoints"


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run with one checkpoint, beside one that nobody stopped."""
    train(tmp_path / "whole", "sft")
    train(tmp_path, "sft", stop=("train", 1))
    return tmp_path


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_message(stopped: Path) -> None:
    with small_files(20_000), pytest.raises(CheckpointError, match=MESSAGE):
        train(stopped, "sft", resume=True)
    assert [path.name for path in checkpoints(stopped).iterdir()] == ["train_step_2"]
    assert "goes on after step 2/6" in train(stopped, "sft", resume=True)
    assert_same_run(stopped / "whole" / "sft", stopped / "sft")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root mounts a disk of its own")
def test_a_full_disk_leaves_the_checkpoint_before(stopped: Path) -> None:
    aside = checkpoints(stopped).rename(stopped / "aside")
    size = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
    disk = checkpoints(stopped)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        shutil.copytree(aside, disk, dirs_exist_ok=True)
        with pytest.raises(CheckpointError, match=MESSAGE.replace("rank 0: ", "rank 0: .*No space left on device")):
            train(stopped, "sft", resume=True)
        assert [path.name for path in disk.iterdir()] == ["train_step_2"]
        subprocess.run(["mount", "-o", f"remount,size={size * 9}", disk], check=True)
        assert "goes on after step 2/6" in train(stopped, "sft", resume=True)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert_same_run(stopped / "whole" / "sft", stopped / "sft")
