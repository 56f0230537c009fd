"""Jobs from mas-hpc launch --submit to their end, on a machine of stand-ins: the real job on two ranks, disturbed and not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mas_hpc.distributed.supervisor_verdict import Ending
from mas_hpc.errors import LaunchError
from mas_hpc.exits import NOT_FINISHED
from mas_hpc.launch.command import hand_in
from mas_hpc.launch.job import Clock, JobNodes, run_job
from mas_hpc.launch.jobs import look_at, merged_log
from mas_hpc.launch.outcome import Outcome
from mas_hpc.launch.render import render
from tests.launch.stand_in_site import TIMEOUT_S, Machine, machine, plan_in
from tests.launch.test_staging import make_environment

SLOW_START = ("warm_start.steps=4", "method.steps=8")
QUEUE = ("--queue", "capacity")  # the only one that takes several jobs of a user


# ---- without ranks


class Now:
    """A clock that a test sets."""

    s = 0.0

    def __call__(self) -> float:
        return self.s


def test_ranks_are_asked_before_the_end_and_ended_a_minute_before_it() -> None:
    now = Now()
    clock = Clock(60, 600, now)
    seen = []
    for now.s in (0.0, 2999.0, 3000.0, 3539.0, 3540.0, 4000.0):
        seen.append(clock.hurry())
    assert seen == ["", "", "ask", "ask", "end", "end"]


def test_a_job_that_has_no_time_for_a_checkpoint_asks_nobody() -> None:
    now = Now()
    clock, endless = Clock(5, 0, now), Clock(0, 600, now)
    now.s = 1e6
    assert (clock.hurry(), endless.hurry()) == ("", "")


def test_a_run_that_is_over_starts_nothing_and_one_that_failed_stops_the_chain(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    plan = plan_in(tmp_path)
    plan.folder.mkdir(parents=True)
    for state, code in (("finished", 0), ("failed", 1)):
        Outcome(state=state, job_id="7.x").write(plan)  # type: ignore[arg-type]
        assert run_job(plan, {}, Clock(60, 600)) == code
        assert f"{state} by job 7.x; nothing is left to do" in capfd.readouterr().err


def test_a_job_outside_of_the_scheduler_has_failed(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    plan.folder.mkdir(parents=True)
    with pytest.raises(LaunchError, match="PBS_NODEFILE"):
        run_job(plan, {}, Clock(60, 600))
    found = Outcome.read(plan.folder)
    assert found and found.state == "failed"


def test_a_job_with_too_few_good_nodes_leaves_the_run_to_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    here, plan = machine(tmp_path), plan_in(tmp_path)
    plan.folder.mkdir(parents=True)
    here.plant("no_scratch", "nodeb")
    (tmp_path / "nodes").write_text("localhost\nnodeb\n")
    assert run_job(plan, {**here.environment, "PBS_NODEFILE": str(tmp_path / "nodes")}, Clock(60, 600)) == NOT_FINISHED
    assert "1 nodes of 2 can be used, 2 are needed: --spares 1 or more" in capfd.readouterr().err
    found = Outcome.read(plan.folder)
    assert found and found.state == "not finished" and found.dropped.keys() == {"nodeb"}


def test_nodes_that_ranks_name_are_replaced_while_there_are_others(tmp_path: Path) -> None:
    here, plan = machine(tmp_path), plan_in(tmp_path, nodes=4, spares=2)
    plan.folder.mkdir(parents=True)
    nodes = JobNodes(plan, ["localhost", "nodeb", "nodec", "noded"], "localhost", here.environment, Clock(60, 600))
    assert nodes.replace(Ending(verdict="died", what="")) == "" and nodes.active == ["localhost", "nodeb"]
    assert nodes.replace(Ending(verdict="hung", what="", silent=frozenset({1}))) == ""
    assert (nodes.active, nodes.spares) == (["localhost", "nodec"], ["noded"])
    here.plant("no_scratch", "nodec", "noded")  # a spare that is bad by now is no spare
    assert nodes.replace(Ending(verdict="lost", what="")) == "no node is left in place of nodec"
    assert nodes.dropped.keys() == {"nodeb", "nodec", "noded"}


def test_the_launchers_word_of_a_lost_node_counts_whatever_its_code(tmp_path: Path) -> None:
    nodes = JobNodes(plan_in(tmp_path), ["localhost", "nodeb"], "localhost", {}, Clock(60, 600))
    nodes._hear("nodeb: rank 1 died from signal 15")
    assert not nodes.lost()
    nodes._hear("nodeb: shepherd died from signal 9")
    assert nodes.lost()


def test_ranks_are_asked_by_a_file_once_the_run_has_a_folder(tmp_path: Path) -> None:
    now = Now()
    plan = plan_in(tmp_path)
    nodes = JobNodes(plan, ["localhost", "nodeb"], "localhost", {}, Clock(60, 600, now))
    now.s = 3100.0
    assert nodes.hurry() == "ask" and not Path(plan.run_dir).exists()
    Path(plan.run_dir).mkdir(parents=True)
    assert nodes.hurry() == "ask" and Path(plan.run_dir, "stop").exists()


def test_a_folder_that_an_attempt_has_only_made_is_put_aside(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    plan.folder.mkdir(parents=True)
    Path(plan.run_dir).mkdir()
    nodes = JobNodes(plan, ["localhost", "nodeb"], "localhost", {}, Clock(60, 600))
    assert not nodes._is_there(1) and not Path(plan.run_dir).exists()
    Path(plan.run_dir).mkdir()
    Path(plan.run_dir, "config.yaml").touch()
    assert nodes._is_there(2)


# ---- with ranks


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A training of two jobs in a chain, of which the first does it all."""
    here = machine(tmp_path_factory.mktemp("undisturbed"))
    first, second = here.submit("--chain", "1", *QUEUE, *SLOW_START, job="train")
    code, said = here.end_of(first)
    assert code == 0, said
    code, said = here.end_of(second)
    assert code == 0 and f"finished by job {first}; nothing is left to do" in said
    return here


def weights(here: Machine) -> dict[str, bytes]:
    (file,) = (here.folder / "runs/run/model").glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_the_script_brings_modules_and_the_roles_environment_to_ranks_that_write_their_own_logs(undisturbed: Machine) -> None:
    here = undisturbed
    assert (here.home / "modules").read_text() == "load frameworks\n" * 2
    lines = list(merged_log(here.folder / "runs/run"))
    assert {line.split("]")[0] for line in lines} == {"[rank 0", "[rank 1"}
    assert any("rank 1 of 2, attempt 0" in line for line in lines)
    assert "train 8/8" in here.output("1.stand-in"), "the first rank is heard by the user too"
    assert here.outcome().state == "finished"
    (row,) = look_at(here.folder / "runs")
    assert (row.state, row.phase, row.ranks, row.silent, row.starts) == ("finished", "done", 2, 0, 1)


@pytest.mark.slow
def test_a_run_that_was_asked_to_end_goes_on_in_the_next_job_to_the_same_weights(tmp_path: Path, undisturbed: Machine) -> None:
    here = machine(tmp_path)
    first, second = here.submit("--chain", "1", *QUEUE, *SLOW_START, job="train")
    folder = here.folder / "runs/run"
    here.wait_for(lambda: '"phase": "train", "step": 1' in read(folder / "metrics.jsonl"), "no step", first)
    (folder / "stop").touch()  # as the job's clock does
    code, said = here.end_of(first)
    assert code == NOT_FINISHED and "asked to end after step" in said, said
    steps = sorted(int(path.name.rpartition("_")[2]) for path in (folder / "checkpoints").glob("train_step_*"))
    assert steps and steps[-1] not in (5, 8), "a checkpoint between two that were planned"
    code, said = here.end_of(second)
    assert code == 0 and f"train: goes on after step {steps[-1]}/8" in said, said
    assert weights(here) == weights(undisturbed)
    assert here.outcome().state == "finished"


@pytest.mark.slow
def test_the_clock_ends_a_job_with_a_checkpoint_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of one minute whose ranks are asked after 12 s: nobody else touches the file, and no training is near its end."""
    here = machine(tmp_path)
    for name in ("PATH", "STAND_IN", "STAND_IN_MPIEXEC"):
        monkeypatch.setenv(name, here.environment[name])
    plan = plan_in(
        here.folder, job="train", overrides=(*SLOW_START, "method.steps=100000", "checkpoint.every=100000"), chain=1,
        walltime_min=1, signal_s=48, queue="capacity", project="P", filesystems=("home",),
    )  # fmt: skip
    script = plan.write().with_name("job.sh")
    script.write_text(render(plan))
    start_s = time.monotonic()
    first, second = hand_in(plan, script)
    code, said = here.end_of(first)
    assert code == NOT_FINISHED and "asked to end after step" in said, said
    assert 12.0 <= time.monotonic() - start_s < 36.0, "a minute less the 48 s for a checkpoint, and before ranks are ended"
    (checkpoint,) = (here.folder / "runs/run/checkpoints").glob("train_step_*")
    step = checkpoint.name.rpartition("_")[2].lstrip("0")
    here.wait_for(lambda: f"train: goes on after step {step}/100000" in here.output(second), "not resumed", second)
    assert here.outcome().state == "running"
    (here.folder / "runs/run/stop").touch()
    assert here.end_of(second)[0] == NOT_FINISHED
    assert here.outcome().state == "not finished"


@pytest.mark.slow
def test_a_rollout_without_a_job_can_be_asked_to_end_too_and_goes_on(tmp_path: Path) -> None:
    here = machine(tmp_path)
    words = [sys.executable, "-m", "mas_hpc", "rollout", str(here.folder / "c.yaml"), "warm_start=null", "data.num_test=300",
             "rollout.num_tasks=300", f"runs_dir={here.folder / 'runs'}"]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        here.wait_for(lambda: here.traces(), "no trace", "")
        (here.folder / "runs/run/stop").touch()
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == NOT_FINISHED and "asked to end; every finished trace is kept" in said, said
    assert 0 < len(here.traces()) < 300
    subprocess.run([*words, "--resume", str(here.folder / "runs/run")], check=True, capture_output=True, timeout=TIMEOUT_S)
    assert len(here.traces()) == len(set(here.traces())) == 300


def read(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart(tmp_path: Path) -> None:
    here = machine(tmp_path)
    (job,) = here.submit("rollout.num_tasks=300", "data.num_test=300", "warm_start=null")
    log = here.folder / "runs/run.job/logs/rank_0001.log"
    here.wait_for(lambda: here.traces(), "no trace", job)
    os.kill(int(re.findall(r"attempt 0, process (\d+)", read(log))[0]), signal.SIGKILL)
    code, said = here.end_of(job)
    assert code == 0 and "died of SIGKILL; all ranks start again" in said, said
    found = here.traces()
    assert len(found) == len(set(found)) == 300
    assert "attempt 1, process" in read(log)


@pytest.mark.slow
def test_bad_nodes_are_left_out_before_the_start_and_after_it_and_copies_are_used(tmp_path: Path) -> None:
    here = machine(tmp_path)
    here.plant("no_scratch", "nodeb")
    here.plant("shepherd", "nodec")
    archive = make_environment(here.folder, torch=True)
    (job,) = here.submit("--spares", "2", "--stage", str(archive), "rollout.num_tasks=20", "warm_start=null")
    code, said = here.end_of(job)
    assert code == 0, said
    assert "node nodeb is left out: " in said and "node nodec is left out: the launcher lost its process there" in said
    folder = here.folder / "runs/run.job"
    assert [read(folder / f"hosts_{n}.txt").split() for n in (0, 1)] == [["localhost", "nodec"], ["localhost", "noded"]]
    assert here.outcome().dropped.keys() == {"nodeb", "nodec"}
    assert len(set(here.traces())) == 20
    assert (here.folder / "scratch@noded/mas_hpc/env/bin/python").is_file()


@pytest.mark.slow
def test_one_rank_alone_runs_and_a_mistake_stops_the_chain(tmp_path: Path) -> None:
    here = machine(tmp_path)
    (job,) = here.submit("rollout.num_tasks=4", "warm_start=null", nodes=1)
    code, said = here.end_of(job)
    assert code == 0 and len(here.traces()) == 4, said
    _, second = here.submit("--chain", "1", *QUEUE, "name=wrong", "model.path=none/such", nodes=1)
    code, said = here.end_of(second)
    assert code == 1 and "failed by job" in said, said
    assert here.outcome("wrong").state == "failed"
