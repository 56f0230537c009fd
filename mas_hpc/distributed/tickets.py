"""Which rank does which job: handed out as ranks become free, taken back from those that die or stall."""

from __future__ import annotations

from typing import Protocol

from mas_hpc.distributed.shared_tickets import SharedTickets, next_phase
from mas_hpc.distributed.world import World


class Tickets(Protocol):
    """Jobs 0..count-1, each finished exactly once. No method waits: a rank with nothing to do sleeps some milliseconds itself.

    The driver of a rank, in one loop:

        while not tickets.exhausted:
            started = tickets.take(len(live), capacity - len(live))
            ...  # start them, work for a while, and for every episode that has ended:
            if tickets.finish(job, result):
                keep(trace)  # else somebody else's counts: drop it
        results = tickets.results()

    A rank that was stopped and comes back may find everything exhausted while it still has live jobs: it cancels them.
    All methods raise LostPeerError, naming the store, when its host is gone.
    """

    def take(self, live: int, room: int) -> list[int]:
        """Jobs to start now: none, or at most `room`, given that `live` jobs of this rank are under way."""
        ...

    def finish(self, job: int, result: bytes) -> bool:
        """Hand in a job; whether this rank's result is the one that counts (False: another took the job over and was first)."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether every job is finished, by whichever rank. Also the sign of life of this rank, so ask it often."""
        ...

    def results(self) -> list[bytes]:
        """Every rank's results that count, in the order of the jobs, once exhausted. Ask once: then they are dropped."""
        ...


class LocalTickets:
    """Tickets of a single rank: everything at once, as far as there is room."""

    def __init__(self, count: int) -> None:
        self._next = 0
        self._results: list[bytes | None] = [None] * count
        self._num_finished = 0

    def take(self, live: int, room: int) -> list[int]:
        """See Tickets."""
        jobs = list(range(self._next, min(self._next + room, len(self._results))))
        self._next += len(jobs)
        return jobs

    def finish(self, job: int, result: bytes) -> bool:
        """See Tickets."""
        assert self._results[job] is None, f"job {job} was finished before"
        self._results[job] = result
        self._num_finished += 1
        return True

    @property
    def exhausted(self) -> bool:
        """See Tickets."""
        return self._num_finished == len(self._results)

    def results(self) -> list[bytes]:
        """See Tickets."""
        assert self.exhausted, "results before every job is finished"
        return [result for result in self._results if result is not None]


def open_tickets(world: World, label: str, count: int, *, stall_s: float) -> Tickets:
    """Tickets of the next phase of the run. Every rank opens the same phases in the same order, but need not be there at once.

    label: what is played, for messages; it may come again. stall_s: a rank without a sign of life for so long loses its jobs.
    Raises LostPeerError, naming the store, when its host is gone.
    """
    if world.size == 1:
        return LocalTickets(count)
    assert world.store is not None, "ranks open tickets while connected"
    return SharedTickets(next_phase(world.store, world.rank, world.size, label, count), stall_s=stall_s)
