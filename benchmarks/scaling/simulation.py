"""A discrete-event simulation: processes that send messages to stations, each of which serves one message at a time.

A process is a generator. It yields either seconds to sleep or a Message to wait for, and goes on when that is over.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

Process = Generator["float | Message", None, None]
MAX_KEPT = 100_000


class Station:
    """Something that serves messages one by one in the order in which they come, such as the thread of a store's host.

    Example: Station("store").serve(now=0.0, service_s=1e-5) == 1e-5
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.free_s = 0.0
        """When it is done with all that has come."""
        self.busy_s = 0.0
        self.num_served = 0
        self.delays_s: list[float] = []
        """From coming to being served, of a uniform sample of the messages."""
        self._random = random.Random(0)

    def serve(self, now: float, service_s: float) -> float:
        """When a message that comes now has been served."""
        self.free_s = max(now, self.free_s) + service_s
        self.busy_s += service_s
        self.num_served += 1
        if len(self.delays_s) < MAX_KEPT:
            self.delays_s.append(self.free_s - now)
        elif (place := self._random.randrange(self.num_served)) < MAX_KEPT:
            self.delays_s[place] = self.free_s - now
        return self.free_s

    def delay_s(self, share: float) -> float:
        """Quantile of the delays; 0 where nothing came."""
        ordered = sorted(self.delays_s)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """A message to a station, which its sender waits for if `answered`.

    Example: Message(store, 9e-6, answered=True)
    """

    station: Station
    service_s: float
    answered: bool = True


@dataclass(slots=True)
class Simulation:
    """Time, and who goes on when. `round_trip_s` is what an answer takes beside the service."""

    round_trip_s: float = 0.0
    now: float = 0.0
    _heap: list[tuple[float, int, Process]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)

    def start(self, process: Process, at: float = 0.0) -> None:
        """Let a process begin at a time that is not past."""
        assert at >= self.now
        heapq.heappush(self._heap, (at, next(self._order), process))

    def run(self, until: float = math.inf) -> float:
        """Go on until nobody has anything to do, or until then; returns the time."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, process = heapq.heappop(self._heap)
            wanted = next(process, None)
            if wanted is not None:
                heapq.heappush(self._heap, (self._after(wanted), next(self._order), process))
        if math.isfinite(until):
            self.now = until
        return self.now

    def _after(self, wanted: float | Message) -> float:
        if not isinstance(wanted, Message):
            return self.now + wanted
        served_s = wanted.station.serve(self.now, wanted.service_s)
        return served_s + self.round_trip_s if wanted.answered else self.now
