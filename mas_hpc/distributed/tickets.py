"""Which rank does which job: handed out as ranks become free, taken back from those that die or stall."""

from __future__ import annotations

from typing import Protocol


class Tickets(Protocol):
    """Jobs 0..count-1, each finished exactly once."""

    def take(self, live: int, room: int) -> list[int]:
        """Jobs to start now: none, or at most `room`, given that `live` jobs of this rank are under way."""
        ...

    def finish(self, job: int) -> bool:
        """Hand in a job; whether this rank's result is the one that counts (False: another took the job over and was first)."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether every job is finished, by whichever rank. Also the sign of life of this rank, so ask it often."""
        ...
