"""Tickets of several ranks over one store. The store alone knows what is done; a rank may stop at any instruction.

Keys, under "tickets/": `beat/<rank>` is the rank's record: its sign of life and the jobs that it holds, in one value, so that
it cannot live without its leases. `<phase>/next` counts the jobs that were handed out. `<phase>/won/<job>` is the first result
of a job, with the rank that gave it: it is written once, by compare-and-set, and that write alone decides whose result counts.
Everything else may be stale, lost or doubled at the cost of a job played twice, never of one that counts twice or is missing.

Costs, in round trips to the store: 2 a chunk, 1 a finished job, 1 a job to drop it, and about 2 a second a rank (fewer where
ranks are many). A store whose
host is stopped, not dead, blocks its clients until it goes on: torch's client has no timeout for that.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from mas_hpc.distributed.many_keys import WINDOW, read_there, windows
from mas_hpc.errors import LostPeerError

SUPPLY = 0.9
"""Part of its fair share of the work left that a rank has under way. Work that is held back evens out ranks of unequal speed
and luck, but starts later: where a step costs the same for any batch, that is all it does. In a model of decoding (2, 8 ranks,
long-tailed lengths, steps from all base cost to all cost per row) fixed shares took 0.95 to 1.03 times as long as 0.9 on equal
ranks, and 0.99 to 1.21 times where one was 1.5 times slower; with 0.75, 0.85 to 1.09 and 0.91 to 1.21."""
BEAT_S = 1.0
"""Least time between two signs of life, and between two looks at what others have finished while busy; at most stall_s / 8."""
BEATS_PER_S, LOOKS_PER_S, WATCHES_PER_S = 5000.0, 10_000.0, 1000.0
"""Signs of life, looks when idle and looks at the others' records that all ranks together may give or take: the store's host
serves one after the other, at 5 to 25 us each, so that with more ranks each waits longer (benchmarks/scaling/README.md)."""
IDLE_S = 0.02
"""Least time between two looks at what others have finished when there is nothing else to do."""
WATCH_S = 5.0
"""Most time between two looks at the other ranks' records, by a rank that has room when everything is handed out."""
COMPRESSED_BYTES = 16 << 10
"""Longer results are compressed, by zlib's fastest: less than half the size, in less time than JSON takes to be parsed again.
Shorter ones would cost more time than everything else about a ticket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a rank says about itself: its sign of life and its leases.

    Example: Record(phase=2, beat=17, stall_s=300.0, jobs=(4, 9), taken_by=-1)
    """

    phase: int
    beat: int
    """Grows with every sign of life; others compare it over their own clock, so that clocks need not agree."""
    stall_s: float
    """How long the beat may stay the same; 0 between phases, when nothing is promised."""
    jobs: tuple[int, ...]
    taken_by: int = -1
    """The rank that has taken jobs out of it since, if any: two that do so at once must not write the same."""

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps([self.phase, self.beat, self.stall_s, self.jobs, self.taken_by], separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Record:
        """As it was stored."""
        phase, beat, stall_s, jobs, taken_by = json.loads(text)
        return Record(phase=phase, beat=beat, stall_s=stall_s, jobs=tuple(jobs), taken_by=taken_by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What all ranks agree on before they play.

    Example: Phase(number=1, label="rollout", count=64, rank=0, size=2, store=store)
    """

    number: int
    label: str
    count: int
    rank: int
    size: int
    store: Store
    """Of all phases."""


def next_phase(store: Store, rank: int, size: int, label: str, count: int) -> Phase:
    """The phase that this rank opens next; numbers are never used again in one store."""
    store = PrefixStore("tickets", store)
    with reaching(store, label, rank):
        number = store.add(f"opened/{rank}", 1)
        mine = json.dumps([label, count])
        agreed = store.compare_set(f"{number}/what", "", mine).decode()
    assert agreed == mine, f"rank {rank} plays {mine} while another plays {agreed}: they open different phases"
    return Phase(number=number, label=label, count=count, rank=rank, size=size, store=store)


def declare_gone(store: Store, rank: int) -> None:
    """Say for certain that a rank has died: its jobs are taken over at once, and nothing is kept for it."""
    PrefixStore("tickets", store).append("gone", f"{rank},")  # type: ignore[attr-defined]  # absent from torch's stubs


def read_records(store: Store, ranks: Sequence[int]) -> dict[int, Record]:
    """What ranks last said about themselves; of those that have come to a phase."""
    return {rank: Record.from_json(text) for rank, text in _texts(PrefixStore("tickets", store), ranks).items()}


def _texts(store: Store, ranks: Sequence[int]) -> dict[int, str]:
    found = read_there(store, [f"beat/{rank}" for rank in ranks])
    return {int(key.rpartition("/")[2]): text.decode() for key, text in found.items()}


@contextmanager
def reaching(store: Store, label: str, rank: int) -> Iterator[None]:
    """A store that is gone is a LostPeerError that names it."""
    try:
        yield
    except dist.DistError as error:
        raise LostPeerError(
            f"{label}: rank {rank} has lost the store of the ranks at {address(store)} ({error}): the process that hosts it "
            "has ended, so nobody can hand out work; look for the first error of that process, then start again"
        ) from error


def address(store: Store) -> str:
    """host:port of the store under the prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else type(store).__name__


def beat_s(size: int) -> float:
    """Time between two signs of life of a rank, and between two looks of whoever watches them, where stall_s allows."""
    return max(BEAT_S, size / BEATS_PER_S)


def supply(live: int, finished: int, unassigned: int, count: int, size: int) -> int:
    """How many more jobs a rank with `live` under way asks for: up to SUPPLY of its fair share of what is left.

    The share supposes that the others finish as many as it does, and from when they have not, that they hold nothing: a rank
    that comes first must not take what the others are about to.
    """
    share = max(count / size - finished, (unassigned + live) / size)
    return max(0, min(unassigned, math.ceil(SUPPLY * share) - live))


class Silence:
    """For how long ranks have given no sign of life, on the observer's own clock."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def of(self, rank: int, beat: int, now: float) -> float:
        """Seconds since this beat of the rank was first seen here."""
        last, since = self._seen.get(rank, (beat, now))
        self._seen[rank] = (beat, since if last == beat else now)
        return now - self._seen[rank][1]


class SharedTickets:
    """Tickets of one rank of several. `clock` is any that runs evenly; the ranks' clocks need not agree."""

    def __init__(self, phase: Phase, *, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._phase = phase
        self._store = phase.store
        self._keys = f"{phase.number}/"
        self._stall_s = stall_s
        self._beat_s = min(beat_s(phase.size), stall_s / 8)
        self._idle_s = min(max(IDLE_S, phase.size / LOOKS_PER_S), self._beat_s)
        self._watch_s = min(max(WATCH_S, phase.size / WATCHES_PER_S), stall_s / 4)
        self._clock = clock
        self._held: set[int] = set()
        self._num_finished = 0  # here
        self._num_handed_out = 0  # at least
        self._frontier = 0  # all jobs below it are finished
        self._beat = 0
        self._num_watched = 0
        self._silence = Silence()
        now = clock()
        self._next_beat = self._next_look = self._next_watch = now
        self._stuck_since: float | None = None  # everything is handed out, and the frontier has not moved
        with self._reaching():
            self._write_record()

    def take(self, live: int, room: int) -> list[int]:
        """See Tickets."""
        if room <= 0:
            return []
        with self._reaching():
            self._beat_when_due()
            jobs = self._draw(live, room) if self._num_handed_out < self._phase.count else self._take_over(room)
            if jobs:
                self._held.update(jobs)
                self._write_record()
        return jobs

    def finish(self, job: int, result: bytes) -> bool:
        """See Tickets."""
        self._held.discard(job)
        self._num_finished += 1
        if not self._held:
            self._next_look = self._clock()
        tag = f"{self._phase.rank}:".encode()
        with self._reaching():
            level = 1 if len(result) > COMPRESSED_BYTES else 0
            value: Any = tag + zlib.compress(result, level)  # torch's stubs say str and mean bytes
            return self._store.compare_set(self._won(job), "", value).startswith(tag)

    @property
    def exhausted(self) -> bool:
        """See Tickets."""
        with self._reaching():
            self._beat_when_due()
            now = self._clock()
            if self._frontier < self._phase.count <= self._num_handed_out and now >= self._next_look:
                self._next_look = now + (self._beat_s if self._held else self._idle_s)
                self._advance(now)
        return self._frontier == self._phase.count

    def results(self) -> list[bytes]:
        """See Tickets."""
        assert self.exhausted, "results before every job is finished"
        with self._reaching():
            found = [
                zlib.decompress(value.partition(b":")[2])
                for jobs in self._windows(0)
                for value in self._store.multi_get([self._won(job) for job in jobs])
            ]
            self._close()
        return found

    def _reaching(self) -> AbstractContextManager[None]:
        return reaching(self._store, self._phase.label, self._phase.rank)

    def _won(self, job: int) -> str:
        return f"{self._keys}won/{job}"

    def _windows(self, start: int) -> Iterator[Sequence[int]]:
        return windows(range(start, self._phase.count))

    def _write_record(self, *, is_open: bool = True) -> None:
        self._beat += 1
        record = Record(
            phase=self._phase.number, beat=self._beat, stall_s=self._stall_s if is_open else 0.0, jobs=tuple(sorted(self._held))
        )
        self._store.set(f"beat/{self._phase.rank}", record.to_json())

    def _beat_when_due(self) -> None:
        now = self._clock()
        if now < self._next_beat:
            return
        self._next_beat = now + self._beat_s
        self._write_record()
        if self._num_handed_out < self._phase.count:
            self._num_handed_out = self._store.add(f"{self._keys}next", 0)

    def _advance(self, now: float) -> None:
        """Move the frontier over the windows of jobs that are all finished, from where any rank has moved it."""
        key = f"{self._keys}frontier"
        begun, shared = self._frontier, self._store.add(key, 0)
        self._frontier = max(begun, shared)
        for jobs in self._windows(self._frontier):
            if not self._store.check([self._won(job) for job in jobs]):
                break
            self._frontier = jobs[-1] + 1
        if self._frontier > shared:
            self._store.set(key, str(self._frontier))  # two that do so at once may set it back, which costs them a look
        if self._frontier > begun:
            self._stuck_since = now

    def _draw(self, live: int, room: int) -> list[int]:
        """A chunk of the jobs that nobody has had yet."""
        phase, key = self._phase, f"{self._keys}next"
        if not self._supply(live):
            return []
        self._num_handed_out = self._store.add(key, 0)
        wanted = min(room, self._supply(live))
        if not wanted:
            return []
        self._num_handed_out = self._store.add(key, wanted)
        return list(range(self._num_handed_out - wanted, min(self._num_handed_out, phase.count)))

    def _supply(self, live: int) -> int:
        phase = self._phase
        return supply(live, self._num_finished, max(0, phase.count - self._num_handed_out), phase.count, phase.size)

    def _take_over(self, room: int) -> list[int]:
        """Jobs of ranks that are gone or stalled, and now and then those that no record knows."""
        now = self._clock()
        if now < self._next_watch:
            return []
        self._next_watch = now + self._watch_s
        gone = _gone(self._store)
        for rank, text in self._texts(self._watched()).items():
            record = Record.from_json(text)
            if record.phase == self._phase.number and record.jobs:
                is_lost = self._silence.of(rank, record.beat, now) >= self._stall_s or rank in gone
                jobs = self._take_lease(rank, text, room) if is_lost else []
                if jobs:
                    return jobs
        if self._stuck_since is None or now - self._stuck_since < self._stall_s:
            self._stuck_since = self._stuck_since or now
            return []
        self._stuck_since = now
        return self._find_unknown(room)

    def _watched(self) -> list[int]:
        """The next WINDOW of the other ranks, in a circle that begins behind this one."""
        others = self._phase.size - 1
        steps = [(self._num_watched + step) % others for step in range(min(WINDOW, others))]
        self._num_watched += len(steps)
        return [(self._phase.rank + 1 + step) % self._phase.size for step in steps]

    def _texts(self, ranks: Sequence[int]) -> dict[int, str]:
        return _texts(self._store, ranks)

    def _take_lease(self, rank: int, text: str, room: int) -> list[int]:
        """Unfinished jobs of a lost rank; none if another rank was faster or the rank has come back."""
        record = Record.from_json(text)
        left = replace(record, jobs=record.jobs[room:], taken_by=self._phase.rank).to_json()
        if self._store.compare_set(f"beat/{rank}", text, left).decode() != left:
            return []
        return self._startable(record.jobs[:room])

    def _find_unknown(self, room: int) -> list[int]:
        """Unfinished jobs in nobody's record: whose taker died before it could write them down. Two ranks may find the same."""
        records = [Record.from_json(text) for text in self._texts(range(self._phase.size)).values()]
        known = {job for record in records if record.phase == self._phase.number for job in record.jobs}
        return self._startable([job for job in range(self._frontier, self._phase.count) if job not in known])[:room]

    def _startable(self, jobs: Sequence[int]) -> list[int]:
        return [job for job in jobs if job not in self._held and not self._store.check([self._won(job)])]

    def _close(self) -> None:
        """Say that this rank has read everything; the last one that can still read drops it."""
        phase, keys = self._phase, self._keys
        self._held.clear()
        self._write_record(is_open=False)
        self._store.set(f"{keys}read/{phase.rank}", "")
        num_read = self._store.add(f"{keys}num_read", 1)
        gone = _gone(self._store)
        if num_read + len(gone) < phase.size:
            return
        readers = [f"{keys}read/{rank}" for rank in range(phase.size) if rank not in gone]
        if not self._store.check(readers):
            return
        for job in range(phase.count):
            self._store.delete_key(self._won(job))
        for name in ("next", "what", "frontier", "num_read", *(f"read/{rank}" for rank in range(phase.size))):
            self._store.delete_key(f"{keys}{name}")


def gone_ranks(store: Store) -> set[int]:
    """Ranks that were declared gone."""
    return _gone(PrefixStore("tickets", store))


def _gone(store: Store) -> set[int]:
    return {int(rank) for rank in store.get("gone").decode().split(",") if rank} if store.check(["gone"]) else set()
