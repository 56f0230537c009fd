"""Each rank's output goes to its own file; the first is heard by whoever started it as well."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mas_hpc.distributed.launchers import LOGS
from tests.distributed.launch import environment

SCRIPT = """
import faulthandler, os, sys
from mas_hpc.distributed.rank_logs import log_to_file
from mas_hpc.distributed.world import World
log_to_file(World(rank=int(sys.argv[1]), size=2))
print("said")
print("in two", end=" ")
print("parts", flush=True)
os.write(2, b"by a library\\n")
print("complained", file=sys.stderr)
os.abort() if sys.argv[2] == "dies" else None
"""


def run(folder: Path, rank: int, ends: str = "well") -> tuple[str, list[str]]:
    """What the process said to whoever started it, and to its file."""
    words = [sys.executable, "-X", "faulthandler", "-c", SCRIPT, str(rank), ends]
    done = subprocess.run(words, env=environment({LOGS: str(folder / "logs")}), capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, (folder / "logs" / f"rank_{rank:04}.log").read_text().splitlines()


@pytest.mark.parametrize("rank", [0, 1])
def test_lines_bear_the_time_and_those_of_libraries_are_there_too(tmp_path: Path, rank: int) -> None:
    said, lines = run(tmp_path, rank)
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} "
    assert re.fullmatch(f"{stamp}rank {rank} of 2, attempt 0, process \\d+", lines[0])
    assert [re.sub(stamp, "T ", line) for line in lines[1:]] == ["T said", "T in two parts", "by a library", "T complained"]
    assert said.splitlines()[1:] == (["said", "in two parts", "complained"] if rank == 0 else [])


def test_what_a_dying_process_says_is_in_its_file(tmp_path: Path) -> None:
    _, lines = run(tmp_path, 1, "dies")
    assert "Fatal Python error: Aborted" in lines


def test_a_rank_that_is_told_no_folder_talks_to_whoever_started_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, "1", "well"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "said\nin two parts\n" and not list(tmp_path.iterdir())
