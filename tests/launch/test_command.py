"""mas-hpc launch as a user has it: what it prints, what it hands in, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mas_hpc.cli import app
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.launch.plan import JobPlan

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/at_grpo.yaml")
SOUND = ("--nodes", "2", "--walltime", "1:00:00", "-A", "P", "method.tasks_per_step=24", "checkpoint.every=5")
QSUB = """#!/bin/bash
echo "$PWD $*" >> "{log}"
[ "$(wc -l < "{log}")" -le "{limit}" ] || {{ echo "qsub: would exceed limit" >&2; exit 38; }}
echo "$(wc -l < "{log}").aurora-pbs"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to launch from, on a machine that could be Aurora: its file systems are not asked for."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "mas_hpc/launch/aurora/site.yaml").read_text(encoding="utf-8")
    assert "  submit_from: [/lus/flare/projects, /flare]" in text
    text = text.replace("  submit_from: [/lus/flare/projects, /flare]", f"  submit_from: [{tmp_path}]")
    (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def launch(*words: str):
    return CliRunner().invoke(app, ["launch", CONFIG, *words], catch_exceptions=True, env={"COLUMNS": "250"})


def with_qsub(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int = 100) -> Path:
    """A qsub that writes down how it is called, and takes so many jobs."""
    log = folder / "qsub.log"
    (folder / "bin").mkdir()
    qsub = folder / "bin/qsub"
    qsub.write_text(QSUB.format(log=log, limit=limit), encoding="utf-8")
    qsub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    return log


def test_a_dry_run_shows_everything_and_leaves_nothing(here: Path) -> None:
    before = sorted(here.rglob("*"))
    done = launch("--site", "aurora", *SOUND, "--dry-run")
    assert done.exit_code == 0, done.output
    for part in (
        "#PBS -q debug\n", "#PBS -l select=2\n", "#PBS -l walltime=1:00:00\n", "#PBS -A P\n", "mpiexec -n 24 --ppn 12 ",
        "│ 11   │ #0   │ 11    │ 1      │ 81-84 │ 11  │ 5   │ trainer │", "CCL_PROCESS_LAUNCHER",
        "debug takes 2 nodes for 1:00:00", "train: method.kind=at_grpo with data.num_train=6000 (--job pipeline, rollout,",
        "-m mas_hpc train ", "and one 600 s before the walltime ends", "loses its first node, which supervises the others",
    ):  # fmt: skip
        assert part in done.output
    assert sorted(here.rglob("*")) == before


def test_a_dry_run_of_a_job_that_cannot_be_ends_with_one(here: Path) -> None:
    done = launch("--site", "aurora", "--nodes", "100", "--walltime", "6:00:00", "--dry-run")
    assert done.exit_code == 1
    assert "#PBS" not in done.output and "at least 256 nodes in prod" in done.output


def test_submit_writes_the_job_and_hands_it_in_with_those_that_follow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_qsub(here, monkeypatch)
    done = launch("--site", "site.yaml", *SOUND, "--queue", "capacity", "--chain", "2", "--submit")
    assert done.exit_code == 0, done.output + str(done.exception)
    assert "job: train: method.kind=at_grpo" in done.output and "jobs: 1.aurora-pbs 2.aurora-pbs 3.aurora-pbs" in done.output
    job = here / "runs/at_grpo.job"
    script = f"{job}/job.sh"
    assert log.read_text(encoding="utf-8").splitlines() == [
        f"{job} {script}",
        f"{job} -W depend=afterany:1.aurora-pbs {script}",
        f"{job} -W depend=afterany:2.aurora-pbs {script}",
    ]
    plan = JobPlan.read(job / "job.json")
    assert (plan.num_ranks, plan.chain, plan.queue, plan.python) == (24, 2, "capacity", sys.executable)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert not Path(plan.run_dir).exists()  # the ranks make it


def test_what_the_scheduler_refuses_is_told_with_what_is_in_the_queue(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_qsub(here, monkeypatch, limit=1)
    done = launch("--site", "site.yaml", *SOUND, "--queue", "capacity", "--chain", "2", "--submit")
    assert isinstance(done.exception, LaunchError)
    assert "qsub: would exceed limit; 1.aurora-pbs are in the queue" in str(done.exception)


def test_nothing_is_handed_in_where_a_check_finds_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_qsub(here, monkeypatch)
    done = launch("--site", "site.yaml", *SOUND, "--queue", "prod", "--submit")
    assert isinstance(done.exception, LaunchError)
    assert str(done.exception).startswith("queue: prod does not take 2 nodes for 1:00:00; ")
    assert not log.exists() and not (here / "runs").exists()


def test_submit_needs_a_scheduler(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "laptop has no scheduler; use --local -n 2" in str(launch("-n", "2", "--submit").exception)
    monkeypatch.setenv("PATH", str(here))
    assert "qsub: there is none here" in str(launch("--site", "site.yaml", *SOUND, "--submit").exception)


@pytest.mark.parametrize("words", [(), ("--local", "--dry-run"), ("--dry-run", "--submit")])
def test_launch_does_one_thing(words: tuple[str, ...]) -> None:
    assert "expected one of --local" in str(launch("-n", "2", *words).exception)


def test_an_option_that_would_be_ignored_is_refused() -> None:
    assert "leave --nodes, --project out" in str(launch("--local", "-n", "2", "--nodes", "2", "-A", "P").exception)
    assert "leave --nodes, --queue out" in str(launch("-n", "2", "--nodes", "3", "--queue", "q", "--dry-run").exception)
    assert "leave --ppn out" in str(launch("-n", "2", "--ppn", "2", "--dry-run").exception)
    assert "leave -n, --with out" in str(launch("--site", "aurora", "-n", "2", "--with", "mpiexec", "--dry-run").exception)


def test_local_needs_ranks_and_an_unknown_site_is_named() -> None:
    assert "-n RANKS is missing" in str(launch("--local").exception)
    unknown = launch("--site", "frontier", "--dry-run").exception
    assert isinstance(unknown, ConfigError) and "expected one of ['aurora', 'laptop', 'slurm']" in str(unknown)


def test_nodes_of_engines_are_shown_and_not_handed_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_qsub(here, monkeypatch)
    words = ("--site", "site.yaml", *SOUND, "--engine-nodes", "1")
    done = launch(*words, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "│ 12   │ #1   │ 0     │ 0      │ 4-7   │ 0   │ 0   │ native  │" in done.output
    assert "1 nodes trainer, 1 nodes native: the program has no ranks that only serve" in done.output
    assert "no rank of mas-hpc only serves" in str(launch(*words, "--submit").exception)
    assert not log.exists()
    assert "--engine-nodes 2 of --nodes 2: expected at least one" in str(
        launch(*words, "--engine-nodes", "2", "--dry-run").exception
    )
    assert "--engine-nodes 1: rollout has engines alone" in str(launch(*words, "--job", "rollout", "--dry-run").exception)


def test_a_job_that_a_configuration_cannot_do_is_refused_before_there_are_ranks() -> None:
    asked = ["launch", str(ROOT / "configs/mas.yaml"), "--job", "train"]
    local = CliRunner().invoke(app, [*asked, "--local", "-n", "2"])
    assert isinstance(local.exception, ConfigError) and "data.num_train=0: nothing to train on" in str(local.exception)
    shown = CliRunner().invoke(app, [*asked, "--dry-run", "-n", "2"], env={"COLUMNS": "250"})
    assert shown.exit_code == 1 and "data.num_train=0: nothing to train on" in shown.output


def test_a_configuration_that_is_no_text_and_a_run_that_is_not_there_are_told(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe")
    done = CliRunner().invoke(app, ["launch", str(file), "--dry-run"])
    assert isinstance(done.exception, ConfigError) and "c.yaml: not text in UTF-8" in str(done.exception)
    for words in (("--dry-run",), ("--local", "-n", "2")):
        assert "no config.yaml there" in str(launch(*words, "--resume", str(tmp_path / "gone")).exception)


@pytest.mark.slow
def test_the_command_of_a_laptop_runs_as_it_is_printed(here: Path) -> None:
    """Two ranks, started by the line that --dry-run shows."""
    words = ("--job", "rollout", "rollout.num_tasks=2", "warm_start=null", "name=mine")
    done = launch("-n", "2", "--dry-run", *words)
    assert done.exit_code == 0, done.output
    line = done.output.splitlines()[1].strip()
    assert line.startswith("env OMP_NUM_THREADS=1 ")
    ran = subprocess.run(line, shell=True, cwd=here, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (here / "runs/mine/traces").is_dir()
