"""Real processes under the supervisor, with small scripts as ranks; the real job is in test_faults.py."""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mas_hpc.distributed import supervisor_ranks, supervisor_verdict
from mas_hpc.distributed.supervisor import launch
from mas_hpc.distributed.supervisor_ranks import Launch, OwnRanks, Start, ThisHost, rank_environment
from mas_hpc.errors import LaunchError
from mas_hpc.exits import NOT_FINISHED

PRELUDE = """
import os, signal, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
log = open(sys.argv[1], "a")
print(attempt, rank, file=log, flush=True)
while sum(line.startswith(f"{attempt} ") for line in open(sys.argv[1])) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)  # all have started
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(supervisor_verdict, "MAX_BACK_OFF_S", 0.0)
    monkeypatch.setattr(supervisor_ranks, "GRACE_S", 5.0)
    script, log = tmp_path / "rank.py", tmp_path / "log"

    def start(
        body: str, *, ranks: int = 2, max_restarts: int = 2, job: str = "rollout", nodes: ThisHost | None = None
    ) -> tuple[int, list[str]]:
        script.write_text(PRELUDE + body)
        plan = Launch(job=job, command=(sys.executable, str(script), str(log)), ranks=ranks, max_restarts=max_restarts)
        code = launch(plan, nodes)
        return code, sorted(log.read_text().splitlines()) if log.exists() else []

    return start


def test_a_rank_is_told_its_place_as_torchrun_would() -> None:
    base = {"PATH": "/bin", "RANK": "7", "OMP_NUM_THREADS": "4"}
    assert rank_environment(base, 1, 3, port=1234, attempt=2) == {
        "PATH": "/bin", "OMP_NUM_THREADS": "4", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }  # fmt: skip
    assert rank_environment({}, 0, 2, port=1, attempt=0)["OMP_NUM_THREADS"] == "1"


def test_all_ranks_end_well_and_only_others_than_the_first_are_marked(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, log = run("print('hello from', rank, flush=True); time.sleep(0.3 * rank)")
    assert (code, log) == (0, ["0 0", "0 1"])
    output, errors = capfd.readouterr()
    assert output == "hello from 0\n"
    marked, described = sorted(errors.splitlines())  # whichever comes first
    assert marked == "[rank 1] hello from 1" and re.fullmatch(r"launch: ranks are processes \d+ \d+", described)


def test_the_last_words_of_a_rank_are_passed_on_to_a_slow_terminal(run, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    mark_lines = supervisor_ranks._mark_lines

    def slowly(lines, mark: str) -> None:  # type: ignore[no-untyped-def]
        time.sleep(2.0)
        mark_lines(lines, mark)

    monkeypatch.setattr(supervisor_ranks, "_mark_lines", slowly)
    assert run("print('last words') if rank else None") == (0, ["0 0", "0 1"])
    assert "[rank 1] last words\n" in capfd.readouterr().err


def test_the_others_go_on_when_one_dies(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("die() if rank == 1 else time.sleep(1)") == (0, ["0 0", "0 1"])
    assert "rank 1 died of SIGKILL; the others take its work over" in capfd.readouterr().err


def test_all_start_again_when_the_first_dies(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("if attempt == 0: die() if rank == 0 else time.sleep(60)") == (0, ["0 0", "0 1", "1 0", "1 1"])
    assert "rank 0 died of SIGKILL; all ranks start again in 0 s (1 of at most 2 restarts)" in capfd.readouterr().err


def test_all_start_again_when_one_cannot_go_on_without_the_dead(run) -> None:  # type: ignore[no-untyped-def]
    body = "if attempt == 0: time.sleep(0.5 - 0.2 * rank); die() if rank == 1 else sys.exit(1)"
    assert run(body) == (0, ["0 0", "0 1", "1 0", "1 1"])


def test_a_failure_that_is_noticed_before_the_death_behind_it_is_still_its_consequence(run) -> None:  # type: ignore[no-untyped-def]
    body = "if attempt == 0: time.sleep(0.4 * rank); die() if rank == 1 else sys.exit(1)"
    assert run(body) == (0, ["0 0", "0 1", "1 0", "1 1"])


def test_restarts_are_bounded(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, log = run("die() if rank == 0 else time.sleep(60)", max_restarts=1)
    assert code == 1
    assert log == ["0 0", "0 1", "1 0", "1 1"]
    said = "error: rank 0 died of SIGKILL, and the ranks were started 2 times in a row without getting further"
    assert said in capfd.readouterr().err


def test_a_rank_that_fails_by_itself_ends_the_run(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("sys.exit(3) if rank == 0 else time.sleep(60)") == (1, ["0 0", "0 1"])
    assert "error: ranks [0] failed" in capfd.readouterr().err


def test_ranks_that_train_together_start_again_when_any_dies(run) -> None:  # type: ignore[no-untyped-def]
    body = "if attempt == 0: die() if rank == 1 else time.sleep(60)"
    assert run(body, job="train") == (0, ["0 0", "0 1", "1 0", "1 1"])


class Hurried(ThisHost):
    """Nodes whose time is short from the first start on, or over."""

    def __init__(self, found: str) -> None:
        self.found = found

    def hurry(self):  # type: ignore[no-untyped-def]
        return self.found


def test_ranks_whose_time_is_over_are_ended_and_not_started_again(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, started = run("time.sleep(60)", nodes=Hurried("end"))
    assert code == NOT_FINISHED and not [line for line in started if line.startswith("1 ")]
    assert "its time is over, before the ranks had ended" in capfd.readouterr().err


def test_ranks_that_were_asked_to_end_and_died_are_not_started_again_but_those_that_are_done_are_done(run) -> None:  # type: ignore[no-untyped-def]
    assert run("die() if rank == 0 else time.sleep(60)", nodes=Hurried("ask")) == (NOT_FINISHED, ["0 0", "0 1"])


def test_ranks_that_are_done_when_they_are_asked_to_end_are_done(run) -> None:  # type: ignore[no-untyped-def]
    assert run("", nodes=Hurried("ask")) == (0, ["0 0", "0 1"])


def test_ranks_that_end_when_asked_have_not_failed(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("time.sleep(0.5 * rank); sys.exit(85)") == (NOT_FINISHED, ["0 0", "0 1"])
    assert "asked to end; what there is goes on with --resume" in capfd.readouterr().err


def is_running(pid: int) -> bool:
    """A process that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_rank_leaves_behind_is_ended_with_it(run) -> None:  # type: ignore[no-untyped-def]
    body = "import subprocess\nprint('child', subprocess.Popen(['sleep', '60']).pid, file=log, flush=True)\n"
    code, log = run(body + "die() if rank == 0 else time.sleep(60)", max_restarts=0)
    children = [int(line.split()[1]) for line in log if line.startswith("child")]
    assert code == 1 and len(children) == 2 and not any(map(is_running, children))


def test_ranks_that_cannot_all_be_started_are_ended(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    start, started = OwnRanks._start, []

    def fail(what: Start, rank: int):  # type: ignore[no-untyped-def]
        if rank == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(start(what, rank))
        return started[-1]

    monkeypatch.setattr(OwnRanks, "_start", staticmethod(fail))
    with pytest.raises(LaunchError, match="rank 1 cannot be started: Resource temporarily unavailable"):
        run("time.sleep(60)")
    assert started[0].poll() is not None


def test_a_rank_that_cannot_be_ended_now_does_not_end_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_ranks, "GRACE_S", 0.1)
    plan = Launch(job="train", command=("sleep", "60"), ranks=1, max_restarts=0)
    ranks = OwnRanks(Start(plan=plan, port=1, attempt=0, base=os.environ))
    [process] = ranks._processes
    with monkeypatch.context() as waits:
        waits.setattr(process, "kill", lambda: None)  # as one that waits for a file server takes it
        ranks.kill(0, pid=None)
    ranks.end(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_ranks(run, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    body = """
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", rank, file=log, flush=True)
    sys.exit(130)
"""
    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    timer.start()
    code, log = run(body)
    timer.join()
    assert (code, log) == (130, ["0 0", "0 1", "interrupted 0", "interrupted 1"])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


STALL = """
import torch.distributed as dist
from mas_hpc.distributed.shared_tickets import SharedTickets, next_phase
from mas_hpc.distributed.world import ranks_store
host = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
tickets = SharedTickets(next_phase(ranks_store(host, attempt), rank, 2, "test", 8), stall_s=2.0)
tickets.take(0, 2)
if rank == STUCK:
    os.kill(os.getpid(), signal.SIGSTOP)
end = time.monotonic() + 7
while time.monotonic() < end:
    tickets.take(2, 1)
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_stopped_rank_is_ended_and_the_others_go_on(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run(STALL.replace("STUCK", "1")) == (0, ["0 0", "0 1"])
    assert "rank 1 is ended: no sign of life for" in capfd.readouterr().err


def test_a_stall_that_nobody_can_take_over_has_its_own_exit_code(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run(STALL.replace("STUCK", "0"), max_restarts=0) == (124, ["0 0", "0 1"])
    assert "error: rank 0 gave no sign of life" in capfd.readouterr().err


GIVEN_UP = (
    STALL.replace("STUCK", "1 and attempt == 0")
    .replace("+ 7", "+ 2.2")
    .replace(
        "    time.sleep(0.05)\n", "    time.sleep(0.05)\nif attempt == 0: sys.exit(1)  # as one whose peer takes no message\n"
    )
)


@pytest.mark.slow
def test_a_failure_of_a_rank_whose_peer_has_stalled_is_its_consequence(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run(GIVEN_UP) == (0, ["0 0", "0 1", "1 0", "1 1"])
    assert "rank 1 is ended: no sign of life for" in capfd.readouterr().err


TRAINING = """
from mas_hpc.distributed.watchdog import watching
from mas_hpc.distributed.world import World, connected
from mas_hpc.exits import exit_code
def work(world):
    world.watch.at("train", 7)
    WORK
try:
    with connected(World.from_env()) as ranks, watching(ranks, hang_s=60.0, stall_s=60.0) as world:
        work(world)
except Exception as error:
    sys.exit(exit_code(error))
"""


@pytest.mark.slow
def test_the_same_error_at_the_same_step_ends_the_run(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    body = TRAINING.replace("WORK", "raise ValueError('no such agent') if rank == 1 else time.sleep(5)")
    assert run(body, job="train", max_restarts=5) == (1, ["0 0", "0 1", "1 0", "1 1"])
    said = capfd.readouterr().err
    assert "launch: rank 1 broke off at train 7: ValueError: no such agent (" in said
    assert "as before the restart, at the same step: another restart would not help" in said


@pytest.mark.slow
def test_a_hang_that_keeps_python_s_lock_is_no_mistake_of_the_user(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    work = """
    for _ in range(30 if attempt == 0 else 0):  # it has given signs of life
        time.sleep(0.1), world.watch.moved()
    import ctypes
    ctypes.PyDLL(None).sleep(60 if attempt == 0 else 0)
"""
    body = TRAINING.replace("WORK", work).replace("hang_s=60.0", "hang_s=2.0")
    assert run(body, job="train") == (0, ["0 0", "0 1", "1 0", "1 1"])
    assert "launch: no rank got anywhere; all ranks start again" in capfd.readouterr().err


@pytest.mark.slow
def test_what_was_kept_renews_the_restarts(run) -> None:  # type: ignore[no-untyped-def]
    body = TRAINING.replace("WORK", "world.watch.kept(); time.sleep(1); die() if attempt < 3 else None")
    code, log = run(body, job="train", max_restarts=1)
    assert code == 0
    assert log[-1] == "3 1"


MPI = """
import os, signal, sys, time
import mpi4py
mpi4py.rc.finalize = False
from mpi4py import MPI
rank, attempt = MPI.COMM_WORLD.rank, int(os.environ["MAS_HPC_ATTEMPT"])
shared = {line.split()[-1] for line in open("/proc/self/maps") if "/dev/shm/mpich_shm_" in line}
print(attempt, rank, *shared, file=open(sys.argv[1], "a"), flush=True)
MPI.COMM_WORLD.Barrier()
"""


@pytest.fixture
def run_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(supervisor_verdict, "MAX_BACK_OFF_S", 0.0)
    script, log = tmp_path / "rank.py", tmp_path / "log"

    def start(body: str) -> tuple[int, list[list[str]]]:
        script.write_text(MPI + body)
        plan = Launch(job="train", command=(sys.executable, str(script), str(log)), ranks=2, max_restarts=2, starter="mpiexec")
        return launch(plan), sorted(line.split() for line in log.read_text().splitlines())

    return start


def test_ranks_of_mpiexec_start_again_and_leave_no_shared_memory(run_mpi, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, log = run_mpi("if attempt == 0: time.sleep(1 if rank else 60), os.kill(os.getpid(), signal.SIGKILL)\nMPI.Finalize()")
    assert code == 0
    assert [line[:2] for line in log] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert [file for line in log for file in line[2:] if Path(file).exists()] == []
    assert "launch: a rank died of SIGKILL; all ranks start again in 0 s" in capfd.readouterr().err


def test_a_rank_of_mpiexec_that_fails_by_itself_ends_the_run(run_mpi, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, log = run_mpi("time.sleep(0.2)\nos._exit(1) if rank == 1 else time.sleep(60)")
    assert (code, len(log)) == (1, 2)
    assert "launch: error: ranks [0, 1] failed" in capfd.readouterr().err


def test_only_shared_memory_that_a_process_maps_is_its_own(tmp_path: Path) -> None:
    mine, other = (Path(f"/dev/shm/mpich_shm_test_{os.getpid()}_{name}") for name in ("mine", "other"))
    try:
        for file in (mine, other):
            file.write_bytes(b"x" * 4096)
        with mine.open("r+b") as stream, mmap.mmap(stream.fileno(), 0):
            assert supervisor_ranks.mpich_segments(os.getpid()) == {mine}
    finally:
        mine.unlink()
        other.unlink()
