"""A phase of episodes at any number of ranks: the product's own tickets over a simulated store."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from typing import Any

from scaling.counted_store import CountedStore
from scaling.loads import Level, Network
from scaling.measure_store import RECORD_BYTES, RESULT_BYTES
from scaling.simulation import Message, Process, Simulation, Station

from mas_hpc.config import RolloutConfig
from mas_hpc.distributed.shared_tickets import IDLE_S, Phase, SharedTickets

STALL_S = RolloutConfig().stall_s
JOBS, ROWS = 8, 64
"""Episodes of a rank in a step, and how many it can play at once."""
EPISODE_S, LONGEST_S = (3.0, 0.9), 60.0
"""Log-normal seconds of an episode (median 20), and the most, which a limit on tokens sets."""


class Players:
    """Ranks that play one phase with real SharedTickets over a simulated store. A call of theirs happens at once; then its
    messages are paid for, one after the other."""

    def __init__(self, level: Level, network: Network) -> None:
        self.level, self.network = level, network
        self.simulation, self.station = Simulation(network.round_trip_s), Station("store")
        self.store = CountedStore(self.size_of)
        rng = random.Random(0)
        count = JOBS * level.clients * level.leaves
        self.lengths_s = [min(LONGEST_S, rng.lognormvariate(*EPISODE_S)) for _ in range(count)]
        self.played: list[int] = []
        self.last_s = 0.0
        """When the last episode ended."""

    def size_of(self, key: str) -> int | None:
        if key.startswith("beat/"):
            return self.level.leaves * RECORD_BYTES
        return RESULT_BYTES if "/won/" in key else None

    def play(self) -> float:
        """Until everybody knows that all is done; the time."""
        for rank in range(self.level.clients):
            self.simulation.start(self._rank(rank))
        return self.simulation.run()

    def _pay(self) -> Iterator[Message]:
        return self.network.pay(self.station, self.store.take_bill())

    def _rank(self, rank: int) -> Process:
        store: Any = self.store
        phase = Phase(number=1, label="play", count=len(self.lengths_s), rank=rank, size=self.level.clients, store=store)
        own = SharedTickets(phase, stall_s=STALL_S, clock=lambda: self.simulation.now)
        live: list[tuple[float, int]] = []
        rows = ROWS * self.level.leaves
        yield from self._pay()
        while not own.exhausted:
            yield from self._pay()
            for job in own.take(len(live), rows - len(live)):
                heapq.heappush(live, (self.simulation.now + self.lengths_s[job], job))
            yield from self._pay()
            while live and live[0][0] <= self.simulation.now:
                ended_s, job = heapq.heappop(live)
                self.last_s = max(self.last_s, ended_s)
                if own.finish(job, b""):
                    self.played.append(job)
                yield from self._pay()
            yield min(own._beat_s, max(0.0, live[0][0] - self.simulation.now)) if live else IDLE_S
        yield from self._pay()
