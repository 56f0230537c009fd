"""Signs of life of every rank, and the end of a run in which nobody gets anywhere.

Collectives may wait for ever (xccl has no timeout, gloo's is 30 minutes), and every rank looks alive while they do. So ranks
count what they get done, and share one number that grows whenever one of them has: while rank 0 builds a report, the others
wait at a barrier, and nobody is hung. When it has not grown for hang_s, every rank notices on its own clock within a beat,
writes the stacks of its threads to stacks/rank_<r>.txt in the run folder, and ends with exits.HUNG. Whoever started the ranks
then ends those that could not do so themselves, which were stopped.

Two threads a rank: one talks to the store, which may hang as well; the other looks at the clock alone. Where a call that holds
Python's lock stops both, faulthandler's own thread writes the stacks to stderr LAST_RESORT times as late, and ends the rank
with code 1; so it ends a rank that was stopped for longer and goes on. Costs: two messages to the store and one small file a
beat.

The same beat tells ranks that they are asked to end: by the file STOP in the run folder, which the first rank looks for.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import PrefixStore

from mas_hpc import exits
from mas_hpc.distributed import heartbeats
from mas_hpc.distributed.heartbeats import Heartbeat, LastError

if TYPE_CHECKING:
    from mas_hpc.distributed.world import World

BEAT_S = 5.0
"""Most time between two beats; an eighth of stall_s or hang_s where that is less."""
BEATS_PER_S = 5000.0
"""Beats of all ranks together, which keep their store busy for less than a tenth of the time: many ranks beat less often."""
FILES_PER_S = 50.0
"""Heartbeat files that all ranks together write, so that many ranks do not wear out the metadata server."""
LAST_RESORT = 1.25
STOP = "stop"
"""File in the run folder that asks a run to keep what it has and end: touch runs/mas/stop."""
_ASKED = 1 << 40
"""What the first rank adds to the number that all ranks share when it has found that file."""


class Watch:
    """Where a rank is and how far it has come; what does the work says so, from one thread.

    Example: watch.at("train", 7); watch.moved()
    """

    def __init__(self) -> None:
        self.phase, self.step = "loading", 0
        self.num_kept = 0
        self.is_asked_to_end = False
        """Each rank hears it at its next beat; where ranks have to agree, what the first rank has heard counts."""
        self.folder: Path | None = None
        self.news = threading.Event()
        """Set by what others are to hear at once."""
        self._moves = 0
        self._follow: Callable[[], int] = int

    def opened(self, folder: Path) -> None:
        """The run folder is there: heartbeats and stacks go into it."""
        self.folder = folder
        self._moves += 1

    def at(self, phase: str, step: int = 0) -> None:
        """The rank has come to a phase, or to a step of it."""
        self.phase, self.step = phase, step
        self._moves += 1

    def moved(self) -> None:
        """A part of the step is done."""
        self._moves += 1

    def kept(self) -> None:
        """What a restart goes on from is on disk."""
        self.num_kept += 1
        self._moves += 1
        self.news.set()

    def follow(self, count: Callable[[], int]) -> None:
        """Look at this counter too, from another thread, in place of any before: work that is counted anyway."""
        self._follow = count

    @property
    def count(self) -> int:
        """Changes while the rank gets anywhere."""
        return self._moves + self._follow()


@contextmanager
def watching(world: World, *, hang_s: float, stall_s: float) -> Iterator[World]:
    """Give signs of life for the duration of the block, and end this process when nobody gets anywhere for `hang_s`.

    Yields the world whose `watch` the work is to be told. A supervisor ends a rank that gives no sign for twice `stall_s`. An
    error that ends the block is left in the store. A process without a launcher is watched by its user: it beats for the run
    folder alone, and is not ended.
    """
    rank = _Rank(world, hang_s=hang_s, stall_s=stall_s)
    rank.start()
    try:
        yield replace(world, watch=rank.watch)
        rank.part()
    except BaseException as error:
        rank.tell(error)
        raise
    finally:
        rank.stop()


class _Rank:
    """The threads of one rank."""

    def __init__(self, world: World, *, hang_s: float, stall_s: float) -> None:
        self.watch = Watch()
        self._world, self._hang_s, self._stall_s = world, hang_s, stall_s
        self._store: Any = None
        self._is_met = threading.Event()
        self._beat_s = min(max(BEAT_S, world.size / BEATS_PER_S), hang_s / 8, stall_s / 8)
        self._file_s = max(self._beat_s, world.size / FILES_PER_S)
        self._next_file = 0.0
        self._num_beats, self._count, self._total = 0, -1, -1
        self._someone_moved, self._stopped = threading.Event(), threading.Event()
        self._is_guarded = world.launcher != "none"
        work = [self._guard, self._beats] if self._is_guarded else [self._beats]
        self._threads = [threading.Thread(target=one, daemon=True, name=f"watchdog{one.__name__}") for one in work]

    def start(self) -> None:
        if self._is_guarded:
            self._put_off_last_resort()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Nobody is ended from here on."""
        self._stopped.set()
        self.watch.news.set()
        for thread in self._threads:
            thread.join(2 * self._beat_s)  # a store whose host is stopped never answers
        if self._is_guarded:
            faulthandler.cancel_dump_traceback_later()

    def part(self) -> None:
        """The last sign of life, which promises no other."""
        self._stall_s = 0.0
        self.watch.at("done", self.watch.step)
        self._beat()

    def tell(self, error: BaseException) -> None:
        """Leave the error to whoever reads the store."""
        if isinstance(error, Exception):
            self._is_met.wait(self._beat_s)  # an error may come before the first beat
            self._say(heartbeats.last_error(error, rank=self._world.rank, phase=self.watch.phase, step=self.watch.step))

    # ---- signs of life

    def _beats(self) -> None:
        self._store = _own_client(self._world)
        self._is_met.set()
        self._beat()
        while not self._stopped.is_set():
            self.watch.news.wait(self._beat_s)
            self.watch.news.clear()
            self._beat()

    def _beat(self) -> None:
        watch, count = self.watch, self.watch.count
        has_moved, self._count = count != self._count, count
        total = self._shared(has_moved)
        self._look_for_end(total)
        if total != self._total:
            self._total = total
            self._someone_moved.set()
        self._num_beats += 1
        heartbeat = Heartbeat(
            rank=self._world.rank, phase=watch.phase, step=watch.step, count=count, beat=self._num_beats,
            num_kept=watch.num_kept, stall_s=self._stall_s, pid=os.getpid(), host=socket.gethostname(), time_s=time.time(),
        )  # fmt: skip
        self._say(heartbeat)
        if watch.folder and (time.monotonic() >= self._next_file or not self._stall_s):
            self._next_file = time.monotonic() + self._file_s
            with suppress(OSError):  # a rank is not dead because the disk is full
                heartbeats.write(watch.folder, heartbeat)

    def _look_for_end(self, total: int) -> None:
        folder = self.watch.folder
        if total >= _ASKED:
            self.watch.is_asked_to_end = True
        elif self._world.rank == 0 and folder and (folder / STOP).exists():
            self.watch.is_asked_to_end = True
            self._shared(_ASKED)

    def _shared(self, moves: int) -> int:
        """How often any rank has moved; without a store, this one."""
        if self._store:
            try:
                return PrefixStore("watch", self._store).add("moves", int(moves))
            except dist.DistError:
                self._store = None  # its host has ended: whoever needs it says so; from here on this rank knows of itself alone
        return self._total + moves

    def _say(self, said: Heartbeat | LastError) -> None:
        if self._store:
            try:
                heartbeats.say(self._store, said)
            except dist.DistError:
                self._store = None

    # ---- the end of a hang

    def _guard(self) -> None:
        idle_s, before = 0.0, time.monotonic()
        while not self._stopped.wait(self._beat_s):
            now = time.monotonic()
            idle_s += min(now - before, 2 * self._beat_s)  # a process that was stopped itself does not count that time
            before = now
            if self._someone_moved.is_set():
                self._someone_moved.clear()
                idle_s = 0.0
            self._put_off_last_resort()
            if idle_s >= self._hang_s:
                self._end(idle_s)

    def _put_off_last_resort(self) -> None:
        faulthandler.dump_traceback_later(LAST_RESORT * self._hang_s, exit=True)

    def _end(self, idle_s: float) -> None:
        """Leave the stacks, give the others time to leave theirs, and end."""
        watch, rank = self.watch, self._world.rank
        where = self._write_stacks()
        error = LastError(
            rank=rank, code=exits.HUNG, kind="hang", message=f"nobody has got anywhere for {idle_s:.0f} s", place="",
            phase=watch.phase, step=watch.step,
        )  # fmt: skip
        threading.Thread(target=self._say, args=(error,), daemon=True).start()
        time.sleep(2 * self._beat_s)
        with suppress(OSError):  # neither a full disk nor a closed terminal keeps a hung rank
            if watch.folder:
                _note_missing(watch.folder, rank, self._world.size, since_s=time.time() - idle_s)
        with suppress(OSError):
            print(
                f"error: rank {rank} of {self._world.size}: {error.message} (distributed.hang_s={self._hang_s:g}): a "
                f"collective or a call does not return; this rank is at {watch.phase} {watch.step}; {where}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        os._exit(exits.HUNG)

    def _write_stacks(self) -> str:
        """Where the stacks of all threads of this process are."""
        why = ""
        if self.watch.folder is not None:
            file = _stacks_of(self.watch.folder, self._world.rank)
            try:
                file.parent.mkdir(exist_ok=True)
                with file.open("a", encoding="utf-8") as stream:
                    print(f"attempt {self._world.attempt}, {self.watch.phase} {self.watch.step}:", file=stream, flush=True)
                    faulthandler.dump_traceback(stream, all_threads=True)
                return f"the stacks of all ranks are in {file.parent}"
            except OSError as error:
                why = f", as {file} cannot be written ({error.strerror})"
        faulthandler.dump_traceback(all_threads=True)
        return f"its stacks are above{why}"


def _own_client(world: World) -> Any:
    """A connection beside the main thread's, which is blocked while it waits for a key."""
    store: Any = world.store  # torch's stubs have no clone
    return store.clone() if store else None


def _stacks_of(folder: Path, rank: int) -> Path:
    return folder / "stacks" / f"rank_{rank}.txt"


def _note_missing(folder: Path, rank: int, size: int, *, since_s: float) -> None:
    """Say of each rank that has written no stacks since then that it has not; the first of those that have does."""
    files = {number: _stacks_of(folder, number) for number in range(size)}
    wrote = [number for number, file in files.items() if file.is_file() and file.stat().st_mtime >= since_s]
    for missing in set(files) - set(wrote) if min(wrote, default=-1) == rank else ():
        with files[missing].open("a", encoding="utf-8") as stream:
            stream.write(
                f"No stacks of rank {missing}: it was stopped, its host is gone, or a call holds Python's lock. "
                f"What it last said of itself is in heartbeats/rank_{missing}.json.\n"
            )
