"""mas-hpc jobs: what runs are doing, by what they have written themselves; no scheduler is asked."""

from __future__ import annotations

import heapq
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Column, Table
from rich.text import Text

from mas_hpc.distributed.heartbeats import Heartbeat
from mas_hpc.errors import DataError
from mas_hpc.launch.outcome import Outcome

State = Literal["waiting", "starting", "running", "silent", "ended", "finished", "not finished", "failed"]
STYLES: dict[State, str] = {
    "waiting": "dim", "starting": "dim", "running": "green", "silent": "red", "ended": "", "finished": "", "failed": "red",
    "not finished": "yellow",
}  # fmt: skip
LOGS = "logs"
_STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} ")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A run, or a job whose run has not begun.

    Example: JobState(name="mas", state="running", phase="train", step=7, age_s=2.1, ranks=2)
    """

    name: str
    state: State
    """waiting: submitted; starting: no rank has said anything yet; silent: a rank is later than it has promised; ended: all
    have left. Of a job that is over, what it has written down: failed stops the jobs that follow, not finished leaves them the
    rest.
    """
    phase: str = ""
    step: int = 0
    tokens_per_s: float | None = None
    """Of the newest line of metrics.jsonl that has one, of all ranks together."""
    age_s: float | None = None
    """Of the newest sign of life."""
    ranks: int = 0
    silent: int = 0
    """Ranks that promised a sign of life and are late."""
    starts: int | None = None
    """How often ranks were started; None where no job of a site did."""


def look_at(runs_dir: Path, now_s: float | None = None) -> list[JobState]:
    """Every run and job below a folder, or the one at it, newest sign of life first. Raises DataError when there is none."""
    runs_dir, now_s = runs_dir.absolute(), time.time() if now_s is None else now_s  # "." has no name
    folders = [runs_dir] if (runs_dir / "heartbeats").is_dir() else sorted(runs_dir.iterdir()) if runs_dir.is_dir() else []
    runs = [folder for folder in folders if (folder / "heartbeats").is_dir()]
    waiting = [folder for folder in folders if (folder / "job.json").is_file() and folder.with_suffix("") not in runs]
    if not runs and not waiting:
        raise DataError(f"{runs_dir}: no run there has given a sign of life; expected a run folder, or the folder of runs")
    found = [state_of(folder, now_s) for folder in runs]
    found += [JobState(name=folder.stem, state=_before_signs(folder)) for folder in waiting]
    return sorted(found, key=lambda job: (job.age_s is None, job.age_s))


def _before_signs(job: Path) -> State:
    outcome = Outcome.read(job)
    return "waiting" if outcome is None else "starting" if outcome.state == "running" else outcome.state


def state_of(folder: Path, now_s: float) -> JobState:
    """What the ranks of a run have said last."""
    files = sorted((folder / "heartbeats").glob("rank_*.json"))
    beats = [Heartbeat(**json.loads(file.read_text(encoding="ascii"))) for file in files]
    first = min(beats, key=lambda beat: beat.rank)
    silent = [beat for beat in beats if beat.stall_s and now_s - beat.time_s > beat.stall_s]
    state: State = "silent" if silent else "running" if any(beat.stall_s for beat in beats) else "ended"
    job = folder.with_name(f"{folder.name}.job")
    if (outcome := Outcome.read(job)) and outcome.state != "running":
        state = outcome.state
    return JobState(
        name=folder.name, state=state, phase=first.phase, step=first.step, tokens_per_s=_tokens_per_s(folder / "metrics.jsonl"),
        age_s=now_s - max(beat.time_s for beat in beats), ranks=len(beats), silent=len(silent),
        starts=len(list(job.glob("hosts_[0-9]*.txt"))) if job.is_dir() else None,
    )  # fmt: skip


def _tokens_per_s(file: Path) -> float | None:
    """From the end of the file, which a run may be writing."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = [line for line in stream.read().splitlines(keepends=True) if line.startswith(b"{") and line.endswith(b"\n")]
    for line in reversed(lines):
        metrics = json.loads(line)
        for key in ("tokens_per_s", "rollout/tokens_per_s"):
            if key in metrics:
                return float(metrics[key])
    return None


def jobs_table(jobs: list[JobState]) -> Table:
    """For the user."""
    right = [Column(name, justify="right") for name in ("step", "tokens/s", "last sign", "ranks", "silent", "starts")]
    table = Table("run", "state", "phase", *right)
    for job in jobs:
        numbers = [
            str(job.step) if job.phase else "", f"{job.tokens_per_s:,.0f}" if job.tokens_per_s is not None else "",
            f"{job.age_s:,.0f} s ago" if job.age_s is not None else "", str(job.ranks or ""), str(job.silent or ""),
            str(job.starts) if job.starts is not None else "",
        ]  # fmt: skip
        table.add_row(Text(job.name), Text(job.state, STYLES[job.state]), Text(job.phase), *numbers)
    return table


def merged_log(folder: Path) -> Iterator[str]:
    """Lines of all ranks of a run by time, each with its rank; a line without a time belongs to the one before it.

    Raises DataError when no rank has a log there.
    """
    logs = Path(f"{folder.absolute()}.job", LOGS)
    files = sorted(logs.glob("rank_*.log"))
    if not files:
        raise DataError(f"{logs}: no rank_*.log there; ranks of a job write them, others to their terminal")
    for _, rank, line in heapq.merge(*(_lines(file) for file in files)):
        yield f"[rank {rank}] {line}"


def _lines(file: Path) -> Iterator[tuple[str, int, str]]:
    """Time, rank and text of each line."""
    rank, stamp = int(file.stem.removeprefix("rank_")), ""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if found := _STAMPED.match(line):
                stamp = found[0]
            yield stamp, rank, line.rstrip("\n")
