"""Real processes under the supervisor, with small scripts as ranks; the real job is in test_faults.py."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mas_hpc.distributed import supervisor
from mas_hpc.distributed.supervisor import Launch, judge, launch, rank_environment

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
    monkeypatch.setattr(supervisor, "MAX_BACK_OFF_S", 0.0)
    monkeypatch.setattr(supervisor, "GRACE_S", 5.0)
    script, log = tmp_path / "rank.py", tmp_path / "log"

    def start(body: str, *, ranks: int = 2, max_restarts: int = 2, job: str = "rollout") -> tuple[int, list[str]]:
        script.write_text(PRELUDE + body)
        plan = Launch(job=job, command=(sys.executable, str(script), str(log)), ranks=ranks, max_restarts=max_restarts)
        code = launch(plan)
        return code, sorted(log.read_text().splitlines())

    return start


def test_what_exit_codes_mean() -> None:
    assert judge([None, None]) == "running"
    assert judge([None, 0]) == "running"
    assert judge([None, -9]) == "running"  # the others go on
    assert judge([0, None]) == "done"
    assert judge([0, -9]) == "done"
    assert judge([-9, None]) == "died"
    assert judge([-9, 0]) == "died"
    assert judge([1, None]) == "failed"
    assert judge([None, 1]) == "failed"
    assert judge([0, 1]) == "failed"
    assert judge([1, -9]) == "died"  # it could not go on without the other
    assert judge([None, 1, -11]) == "died"


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
    assert re.fullmatch(r"launch: ranks are processes \d+ \d+\n\[rank 1\] hello from 1\n", errors)


def test_the_last_words_of_a_rank_are_passed_on_to_a_slow_terminal(run, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    mark_lines = supervisor._mark_lines

    def slowly(lines, mark: str) -> None:  # type: ignore[no-untyped-def]
        time.sleep(2.0)
        mark_lines(lines, mark)

    monkeypatch.setattr(supervisor, "_mark_lines", slowly)
    assert run("print('last words') if rank else None") == (0, ["0 0", "0 1"])
    assert "[rank 1] last words\n" in capfd.readouterr().err


def test_the_others_go_on_when_one_dies(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("die() if rank == 1 else time.sleep(1)") == (0, ["0 0", "0 1"])
    assert "rank 1 died of SIGKILL; the others take its work over" in capfd.readouterr().err


def test_all_start_again_when_the_first_dies(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("if attempt == 0: die() if rank == 0 else time.sleep(60)") == (0, ["0 0", "0 1", "1 0", "1 1"])
    assert "cannot go on without rank 0 (SIGKILL)" in capfd.readouterr().err


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
    assert "error: a rank died, and started 2 times (--max-restarts 1)" in capfd.readouterr().err


def test_a_rank_that_fails_by_itself_ends_the_run(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("sys.exit(3) if rank == 0 else time.sleep(60)") == (1, ["0 0", "0 1"])
    assert "error: ranks [0] failed" in capfd.readouterr().err


def test_a_job_that_cannot_go_on_where_it_was_is_not_started_again(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run("die() if rank == 0 else time.sleep(60)", job="train") == (1, ["0 0", "0 1"])
    assert "train cannot go on where it was; start it again" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(run, tmp_path: Path, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
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
    assert "error: a rank stalled" in capfd.readouterr().err


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
