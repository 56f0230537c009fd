"""Ranks on this host under one parent: it hosts their store, outlives them, and starts them again when that can help.

rollout, evaluate: a rank that dies by a signal leaves its work to the others, who go on. In every other case all ranks start
again in the same run folder: they play what is missing, and train from the last whole checkpoint. A mistake of the user, a
device that is too small, and a fault that comes back at the same step end the run instead; see Restarts.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore

from mas_hpc.distributed import heartbeats
from mas_hpc.distributed.heartbeats import Heartbeat, LastError
from mas_hpc.distributed.shared_tickets import Silence, beat_s, declare_gone, read_records
from mas_hpc.distributed.supervisor_ranks import ADDRESS, GRACE_S, POLL_S, Launch, Nodes, Start, ThisHost, wait_until
from mas_hpc.distributed.supervisor_verdict import Ending, Found, Restarts, Verdict, explain, judge, name_of
from mas_hpc.distributed.world import ranks_store
from mas_hpc.exits import HUNG, INTERRUPTED, MISTAKE, NOT_FINISHED

OUTLIVES = ("rollout", "evaluate")
"""Jobs without collectives: the others finish the work of a rank that died."""
SETTLE_S = 1.0
"""A failed rank may be the first sign of another's death: how long that may take to show."""
STALL_FACTOR = 2.0
"""A rank without a sign of life for so many times stall_s is ended. By one the others have its work; it may still come back."""


def launch(plan: Launch, nodes: Nodes | None = None) -> int:
    """Run the ranks until they are done, on this host or on nodes. Says on stderr what it does.

    The exit code: 0, 1, HUNG, INTERRUPTED, or NOT_FINISHED for a run that was asked to end, or has no nodes to go on with.
    """
    host = TCPStore(ADDRESS, 0, None, True, timedelta(seconds=GRACE_S), wait_for_workers=False)
    restarts, nodes = Restarts(plan.max_restarts), nodes or ThisHost()
    with _stop_signals() as stops:
        for attempt in itertools.count(nodes.first_attempt):
            ending = _Attempt(plan, nodes, host, attempt, stops).run()
            code = INTERRUPTED if stops else _decide(ending, nodes, restarts)
            if code is not None:
                return code
            say(f"{ending.what}; all ranks start again in {restarts.delay_s:g} s ({restarts.count} restarts)")
            wait_until(lambda: bool(stops), restarts.delay_s)
            if stops:
                return INTERRUPTED
    raise AssertionError("unreachable")


def _decide(ending: Ending, nodes: Nodes, restarts: Restarts) -> int | None:
    """The exit code of the launch; None: the ranks are started again."""
    if ending.verdict == "done":
        return 0
    if ending.verdict == "failed":
        say(f"error: {ending.what}")
        return 1
    if ending.verdict == "stopped" or nodes.hurry():
        say(ending.what)
        return NOT_FINISHED
    if reason := restarts.refuse(ending):
        say(f"error: {reason}")
        return HUNG if ending.verdict == "hung" else 1
    if reason := nodes.replace(ending):
        say(f"error: {ending.what}, and {reason}")
        return NOT_FINISHED
    return None


def user_environment() -> Mapping[str, str]:
    """What this process was started with, and ranks get."""
    return os.environ


def say(message: str) -> None:
    """To the user, beside what the ranks say."""
    print(f"launch: {message}", file=sys.stderr, flush=True)


class _Attempt:
    """One start of all ranks."""

    def __init__(self, plan: Launch, nodes: Nodes, host: TCPStore, attempt: int, stops: list[int]) -> None:
        self._plan, self._nodes, self._stops = plan, nodes, stops
        self._outlives = plan.job in OUTLIVES and plan.starter == "torchrun" and not plan.shares_layers
        self._store = ranks_store(host, attempt)
        self._silences = Silence(), Silence()
        self._next_look = time.monotonic()
        self._gone: set[int] = set()
        self._stalled: set[int] = set()
        self._ranks = nodes.start(Start(plan=plan, port=host.port, attempt=attempt, base=os.environ))
        say(self._ranks.description)

    def run(self) -> Ending:
        """Watch the ranks until the run is decided, then end those that are left."""
        try:
            while (verdict := self._judge()) == "running" and not self._stops:
                self._note_deaths()
                self._ranks.look()
                self._end_stalled(STALL_FACTOR)
                if self._nodes.hurry() == "end":
                    return Ending(verdict="stopped", what="its time is over, before the ranks had ended")
                time.sleep(POLL_S)
            if not self._stops and verdict not in ("done", "died", "stopped"):
                verdict = self._settle()
            elif verdict in ("done", "stopped"):
                verdict = self._let_end()
            return self._explain(verdict)
        finally:
            self._ranks.end(signal.SIGINT if self._stops else signal.SIGTERM)

    def _judge(self) -> Verdict:
        return judge(self._codes(), outlives=self._outlives)

    def _codes(self) -> list[int | None]:
        """Of the processes; where their starter does not tell them apart, as the ranks have said themselves."""
        codes = self._with_held(self._ranks.codes())
        if self._plan.starter == "torchrun" or codes[0] in (None, 0):
            return codes
        if self._nodes.lost():
            return [-signal.SIGKILL] * len(codes)
        said = {error.rank: error.code for error in self._errors()}
        return [said.get(rank, code if (code and code < 0) or not said else None) for rank, code in enumerate(codes)]

    def _with_held(self, codes: list[int | None]) -> list[int | None]:
        """HUNG for ranks that left as a mistake does, but in the middle of their work and without a word.

        faulthandler ended them (see watchdog): whatever hung has kept Python's lock.
        """
        ended = [rank for rank, code in enumerate(codes) if code == MISTAKE]
        if not ended:
            return codes
        beats = heartbeats.read_all(self._store, Heartbeat, ended)
        said = heartbeats.read_all(self._store, LastError, ended)
        held = {rank for rank, beat in beats.items() if beat.stall_s and rank not in said}
        return [HUNG if rank in held else code for rank, code in enumerate(codes)]

    def _errors(self) -> list[LastError]:
        return list(heartbeats.read_all(self._store, LastError, range(self._plan.ranks)).values())

    # ---- while they run

    def _note_deaths(self) -> None:
        for rank, code in enumerate(self._codes()):
            if code is not None and code < 0 and rank not in self._gone:
                self._gone.add(rank)
                declare_gone(self._store, rank)
                if rank not in self._stalled:
                    say(f"rank {rank} died of {name_of(code)}; the others take its work over")

    def _silent(self) -> dict[int, tuple[float, float]]:
        """Of the ranks that have promised signs of life: seconds without one, and after how many their peers give them up.

        A rank gives two: its watchdog's, and while it plays episodes that of the thread which does so.
        """
        now, found = time.monotonic(), dict[int, tuple[float, float]]()
        alive = [rank for rank, code in enumerate(self._ranks.codes()) if code is None]
        beats, records = heartbeats.read_all(self._store, Heartbeat, alive), read_records(self._store, alive)
        for rank in alive:
            for silence, sign in zip(self._silences, (beats.get(rank), records.get(rank)), strict=True):
                if sign and sign.stall_s:
                    silent = silence.of(rank, sign.beat, now), sign.stall_s
                    found[rank] = max(found.get(rank, silent), silent)
        return found

    def _end_stalled(self, factor: float) -> None:
        """End ranks that have promised signs of life and have given none for `factor` times their stall_s."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + beat_s(self._plan.ranks)
        for rank, (silent_s, stall_s) in self._silent().items():
            if silent_s >= factor * stall_s:
                say(f"rank {rank} is ended: no sign of life for {silent_s:.0f} s, with rollout.stall_s={stall_s:g}")
                self._stalled.add(rank)
                heartbeat = heartbeats.read(self._store, Heartbeat, rank)
                is_here = heartbeat is not None and heartbeat.host == socket.gethostname()
                self._ranks.kill(rank, pid=heartbeat.pid if heartbeat and is_here else None)

    # ---- when it is decided

    def _settle(self) -> Verdict:
        """Whether a failure is the consequence of a death, or of a silent rank that its peers gave up, which is ended."""

        def has_cause() -> bool:
            self._end_stalled(1.0)
            return self._judge() == "died"

        is_late = any(silent_s >= stall_s / 2 for silent_s, stall_s in self._silent().values())
        wait_until(has_cause, SETTLE_S + 2 * beat_s(self._plan.ranks) if is_late else SETTLE_S)
        return self._judge()

    def _let_end(self) -> Verdict:
        """Rank 0 has written everything: the others only have to leave."""
        wait_until(lambda: None not in self._ranks.codes(), GRACE_S)
        left = [rank for rank, code in enumerate(self._ranks.codes()) if code is None]
        if left:
            say(f"ranks {left} did not end within {GRACE_S:g} s of rank 0; ended")
        return self._judge()

    def _explain(self, verdict: Verdict) -> Ending:
        ranks = range(self._plan.ranks)
        beats = heartbeats.read_all(self._store, Heartbeat, ranks)
        return explain(
            verdict,
            Found(
                codes=self._codes(), tells_apart=self._plan.starter == "torchrun", stalled=frozenset(self._stalled),
                errors=self._errors(), heartbeats=beats,
            ),
        )  # fmt: skip


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP that have come, instead of their usual effect; nohup's, which has none, stays."""
    come: list[int] = []
    is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = (signal.SIGINT, signal.SIGTERM, *(() if is_kept else (signal.SIGHUP,)))
    before = [signal.signal(number, lambda number, frame: come.append(number)) for number in numbers]
    try:
        yield come
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
