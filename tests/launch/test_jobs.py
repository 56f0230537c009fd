"""What mas-hpc jobs says of runs is what their ranks have written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mas_hpc.cli import app
from mas_hpc.distributed import heartbeats
from mas_hpc.distributed.heartbeats import Heartbeat
from mas_hpc.errors import DataError
from mas_hpc.launch.jobs import look_at, merged_log

NOW_S = 1000.0
BEAT = Heartbeat(
    rank=0, phase="train", step=7, count=310, beat=42, num_kept=7, stall_s=60.0, pid=1, host="node", time_s=NOW_S - 5
)  # fmt: skip


def run_in(folder: Path, *beats: Heartbeat) -> Path:
    folder.mkdir()
    for beat in beats:
        heartbeats.write(folder, beat)
    return folder


def test_a_run_is_running_silent_or_ended_by_what_its_ranks_promised(tmp_path: Path) -> None:
    late = replace(BEAT, rank=1, time_s=NOW_S - 61)
    gone = replace(BEAT, stall_s=0.0, phase="done", time_s=NOW_S - 900)
    run_in(tmp_path / "on", BEAT, replace(BEAT, rank=1))
    run_in(tmp_path / "late", BEAT, late)
    run_in(tmp_path / "over", gone, replace(gone, rank=1))
    for name, outcome in (("soon", ""), ("now", "running"), ("bad", "failed")):
        (tmp_path / f"{name}.job").mkdir()
        (tmp_path / f"{name}.job" / "job.json").touch()
        if outcome:
            (tmp_path / f"{name}.job" / "outcome.json").write_text(f'{{"state": "{outcome}"}}')
    found = {job.name: (job.state, job.silent) for job in look_at(tmp_path, NOW_S)}
    assert found == {
        "on": ("running", 0), "late": ("silent", 1), "over": ("ended", 0), "soon": ("waiting", 0), "now": ("starting", 0),
        "bad": ("failed", 0),
    }  # fmt: skip


def test_numbers_are_those_of_the_newest_whole_line_and_of_the_job(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "on", BEAT)
    lines = [{"phase": "train", "tokens_per_s": 10.0}, {"phase": "train", "tokens_per_s": 12.5}, {"phase": "train/test"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"tokens_per_s": 9')
    job = tmp_path / "on.job"
    job.mkdir()
    for name in ("job.json", "hosts_0.txt", "hosts_1.txt"):
        (job / name).touch()
    (only,) = look_at(tmp_path, NOW_S)
    assert (only.phase, only.step, only.tokens_per_s, only.age_s, only.starts) == ("train", 7, 12.5, 5.0, 2)
    assert look_at(folder, NOW_S) == [only]


def test_a_merged_log_is_in_the_order_of_time_and_keeps_what_belongs_together(tmp_path: Path) -> None:
    logs = tmp_path / "mas.job" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank_0000.log").write_text("2026-11-28T10:00:00.000 a\n2026-11-28T10:00:02.000 c\n")
    (logs / "rank_0011.log").write_text("2026-11-28T10:00:01.000 b\nFatal Python error\n2026-11-28T10:00:03.000 d\n")
    assert [line.split(" ", 2)[1][:-1] + line[-1] for line in merged_log(tmp_path / "mas")] == ["0a", "11b", "11r", "0c", "11d"]


def test_where_nothing_ran_the_error_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run there has given a sign of life"):
        look_at(tmp_path)
    with pytest.raises(DataError, match="no rank_"):
        list(merged_log(tmp_path))


def test_the_command_prints_a_row_a_run(tmp_path: Path) -> None:
    run_in(tmp_path / "on", replace(BEAT, stall_s=1e12))
    done = CliRunner().invoke(app, ["jobs", str(tmp_path)])
    assert done.exit_code == 0 and "on" in done.output and "running" in done.output
