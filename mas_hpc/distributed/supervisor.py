"""Ranks on this host under one parent: it hosts their store, outlives them, and starts them again when they die.

A rank that dies by a signal leaves its work to the others, who go on. When rank 0 dies, which writes the results, or when the
others cannot go on without the dead (collectives), all ranks start again in the same run folder and play what is missing.
A rank that fails by itself, with an exit code and a message, would fail again: that ends the run.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Literal

from torch.distributed import TCPStore

from mas_hpc.distributed.shared_tickets import BEAT_S, Silence, declare_gone, read_record
from mas_hpc.distributed.world import ranks_store

RESTARTABLE = ("rollout", "evaluate")
"""Jobs that go on where they were; the others would begin again."""
POLL_S = 0.1
"""Time between two looks at the ranks' processes."""
SETTLE_S = 1.0
"""A failed rank may be the first sign of another's death: how long that may take to show."""
GRACE_S = 10.0
"""How long ranks may take to end after rank 0 has, and after each signal that asks them to."""
STALL_FACTOR = 2.0
"""A rank without a sign of life for so many times stall_s is ended. By one the others have its work; it may still come back."""
MAX_BACK_OFF_S = 30.0
STALLED, INTERRUPTED = 124, 130
_ADDRESS = "127.0.0.1"

Verdict = Literal["running", "done", "failed", "died"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is started.

    Example: Launch(job="rollout", command=("python", "-m", "mas_hpc", "rollout", "mas.yaml"), ranks=2, max_restarts=3)
    """

    job: str
    """Name of the job, such as those in RESTARTABLE."""
    command: tuple[str, ...]
    """Of each rank; the environment tells it which one it is."""
    ranks: int
    max_restarts: int
    """Of all ranks together."""


def judge(codes: Sequence[int | None]) -> Verdict:
    """What the ranks' exit codes mean: None still runs, below 0 died of that signal, above 0 failed by itself.

    A failure after a death is taken for its consequence. The end of rank 0 is that of the run.
    """
    died = any(code is not None and code < 0 for code in codes)
    if any(code is not None and code > 0 for code in codes):
        return "died" if died else "failed"
    if codes[0] is None:
        return "running"
    return "done" if codes[0] == 0 else "died"


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, *, port: int, attempt: int) -> dict[str, str]:
    """The variables of one rank, as torchrun would set them; OMP_NUM_THREADS is the user's, if set."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {
        "OMP_NUM_THREADS": "1",
        **base,
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": _ADDRESS,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }


def launch(plan: Launch) -> int:
    """Run the ranks until they are done; the exit code: 0, 1, STALLED or INTERRUPTED. Says on stderr what it does."""
    host = TCPStore(_ADDRESS, 0, None, True, timedelta(seconds=GRACE_S), wait_for_workers=False)
    with _stop_signals() as stops:
        for attempt in itertools.count():
            outcome = _Attempt(plan, host, attempt, stops).run()
            if outcome in _EXIT_CODES:
                return _EXIT_CODES[outcome]
            if plan.job not in RESTARTABLE:
                return _give_up(outcome, f"{plan.job} cannot go on where it was; start it again")
            if attempt == plan.max_restarts:
                return _give_up(outcome, f"started {attempt + 1} times (--max-restarts {plan.max_restarts})")
            delay_s = min(2.0**attempt, MAX_BACK_OFF_S)
            say(f"all ranks start again in {delay_s:g} s ({attempt + 1} of at most {plan.max_restarts} restarts)")
            _wait_until(lambda: bool(stops), delay_s)
            if stops:
                return INTERRUPTED
    raise AssertionError("unreachable")


_EXIT_CODES = {"done": 0, "failed": 1, "stopped": INTERRUPTED}


def say(message: str) -> None:
    """To the user, beside what the ranks say."""
    print(f"launch: {message}", file=sys.stderr, flush=True)


def _give_up(outcome: str, reason: str) -> int:
    say(f"error: a rank {outcome}, and {reason}")
    return STALLED if outcome == "stalled" else 1


class _Attempt:
    """One start of all ranks."""

    def __init__(self, plan: Launch, host: TCPStore, attempt: int, stops: list[int]) -> None:
        self._stops = stops
        self._store = ranks_store(host, attempt)
        self._silence = Silence()
        self._next_look = time.monotonic()
        self._gone: set[int] = set()
        self._stalled: set[int] = set()
        self._processes = [_start(plan, rank, port=host.port, attempt=attempt) for rank in range(plan.ranks)]
        self._readers = [_mark_output(process, rank) for rank, process in enumerate(self._processes) if rank]
        say(f"ranks are processes {' '.join(str(process.pid) for process in self._processes)}")

    def run(self) -> Literal["done", "failed", "died", "stalled", "stopped"]:
        """Watch the ranks until the run is decided, then end those that are left."""
        try:
            while (verdict := judge(self._codes())) == "running" and not self._stops:
                self._note_deaths()
                self._end_stalled(STALL_FACTOR)
                time.sleep(POLL_S)
            if self._stops:
                return "stopped"
            if verdict == "failed":
                verdict = self._settle()
            elif verdict == "done":
                verdict = self._let_end()
            return self._explain(verdict)
        finally:
            self._end(signal.SIGINT if self._stops else signal.SIGTERM)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def _note_deaths(self) -> None:
        for rank, code in enumerate(self._codes()):
            if code is not None and code < 0 and rank not in self._gone:
                self._gone.add(rank)
                declare_gone(self._store, rank)
                if rank not in self._stalled:
                    say(f"rank {rank} died of {signal.Signals(-code).name}; the others take its work over")

    def _settle(self) -> Verdict:
        """Whether a failure is the consequence of a death, or of a silent rank that its peers gave up, which is ended."""

        def has_cause() -> bool:
            self._end_stalled(1.0)
            return judge(self._codes()) == "died"

        is_late = any(silent_s >= stall_s / 2 for silent_s, stall_s in self._silent().values())
        _wait_until(has_cause, SETTLE_S + 2 * BEAT_S if is_late else SETTLE_S)
        return judge(self._codes())

    def _silent(self) -> dict[int, tuple[float, float]]:
        """Of the ranks that have promised signs of life: seconds without one, and after how many their peers give them up."""
        now = time.monotonic()
        records = {rank: read_record(self._store, rank) for rank, code in enumerate(self._codes()) if code is None}
        return {
            rank: (self._silence.of(rank, record.beat, now), record.stall_s)
            for rank, record in records.items() if record and record.stall_s
        }  # fmt: skip

    def _end_stalled(self, factor: float) -> None:
        """End ranks that have promised signs of life and have given none for `factor` times their stall_s."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + BEAT_S
        for rank, (silent_s, stall_s) in self._silent().items():
            if silent_s >= factor * stall_s:
                say(f"rank {rank} is ended: no sign of life for {silent_s:.0f} s, with rollout.stall_s={stall_s:g}")
                self._stalled.add(rank)
                self._processes[rank].kill()
                self._processes[rank].wait(GRACE_S)

    def _let_end(self) -> Verdict:
        """Rank 0 has written everything: the others only have to leave."""
        _wait_until(lambda: None not in self._codes(), GRACE_S)
        left = [rank for rank, code in enumerate(self._codes()) if code is None]
        if left:
            say(f"ranks {left} did not end within {GRACE_S:g} s of rank 0; ended")
        return judge(self._codes())

    def _explain(self, verdict: Verdict) -> Literal["done", "failed", "died", "stalled"]:
        codes = self._codes()
        if verdict == "failed":
            say(f"error: ranks {[rank for rank, code in enumerate(codes) if code]} failed; their messages are above")
            return "failed"
        if verdict == "died":
            died = {rank: signal.Signals(-code).name for rank, code in enumerate(codes) if code is not None and code < 0}
            say(f"cannot go on without rank {', '.join(f'{rank} ({name})' for rank, name in died.items())}")
            return "stalled" if died.keys() <= self._stalled else "died"
        return "done"

    def _end(self, first: signal.Signals) -> None:
        """Ask, then tell, then force; a stopped process hears the last only."""
        for number in dict.fromkeys((first, signal.SIGTERM, signal.SIGKILL)):
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(number)
            _wait_until(lambda: None not in self._codes(), GRACE_S)
        _wait_until(lambda: not any(reader.is_alive() for reader in self._readers), GRACE_S)  # their last words


def _start(plan: Launch, rank: int, *, port: int, attempt: int) -> subprocess.Popen[str]:
    """One rank. Rank 0 talks to the user itself; lines of the others are marked."""
    return subprocess.Popen(
        plan.command,
        env=rank_environment(os.environ, rank, plan.ranks, port=port, attempt=attempt),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if rank else None,
        stderr=subprocess.STDOUT if rank else None,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
    )


def _mark_output(process: subprocess.Popen[str], rank: int) -> threading.Thread:
    """Pass on what a rank says; the thread ends when it, and whoever it has started, says no more."""
    assert process.stdout
    reader = threading.Thread(target=_mark_lines, args=(process.stdout, f"[rank {rank}] "), daemon=True)
    reader.start()
    return reader


def _mark_lines(lines: IO[str], mark: str) -> None:
    for line in lines:
        sys.stderr.write(f"{mark}{line}")


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Return when it holds, or when the time is over."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(POLL_S)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that have come, instead of their usual effect."""
    come: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: come.append(number)) for number in numbers]
    try:
        yield come
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
