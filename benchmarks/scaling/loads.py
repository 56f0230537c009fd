"""What a station has to do for clients that repeat a bill of requests, or that send one each at about the same time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from scaling.counted_store import Request
from scaling.measure_store import Cost
from scaling.simulation import Message, Process, Simulation, Station

STEADY_S = 30.0
"""Simulated time of what goes on all the while."""
MAX_MESSAGES = 500_000
"""Beyond it a burst is computed instead of simulated: a station that is never idle takes the sum of its service times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Clients of one station, and how many ranks stand behind each.

    Example: Level(clients=10_000, leaves=12)
    """

    clients: int
    leaves: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a station had to do.

    Example: Load(messages_per_s=480.0, utilisation=0.004, p99_s=9e-6, took_s=30.0)
    """

    messages_per_s: float
    utilisation: float
    """Service asked for, over the time in which it was."""
    p99_s: float
    """Of the time from a message's coming to its answer."""
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the simulation knows of the machine.

    Example: Network(cost=cost, round_trip_s=5e-5)
    """

    cost: Cost
    round_trip_s: float

    def pay(self, station: Station, bill: Iterable[Request]) -> Iterator[Message]:
        """The messages of a bill, one after the other."""
        for request in bill:
            share_s = self.cost.of(request) / request.messages
            for _ in range(request.messages):
                yield Message(station, share_s, request.answered)

    def alone_s(self, bill: Sequence[Request]) -> float:
        """How long a client takes that has the station for itself."""
        waits = sum(request.messages for request in bill if request.answered)
        return self.busy_s(bill) + waits * self.round_trip_s

    def busy_s(self, bill: Sequence[Request]) -> float:
        """How long a station is busy with it."""
        return sum(self.cost.of(request) for request in bill)


Run = Callable[[Level, Network], Load]


def steadily(network: Network, processes: Callable[[Station], Iterable[tuple[float, Process]]]) -> Load:
    simulation, station = Simulation(network.round_trip_s), Station("store")
    for at, process in processes(station):
        simulation.start(process, at)
    simulation.run(until=STEADY_S)
    served = 1.0 - max(0.0, station.free_s - STEADY_S) / station.busy_s  # the rest waits still
    return Load(
        messages_per_s=served * station.num_served / STEADY_S, utilisation=served * station.busy_s / STEADY_S,
        p99_s=station.delay_s(0.99), took_s=STEADY_S,
    )  # fmt: skip


def repeat(network: Network, station: Station, bill: Sequence[Request], every_s: float) -> Process:
    while True:
        yield from network.pay(station, bill)
        yield every_s


def burst(
    network: Network, bills: Sequence[tuple[int, Sequence[Request]]], *, over_s: float, last: Sequence[Request] = (),
) -> Load:  # fmt: skip
    """Clients that each send a bill, beginning at random within `over_s`, and then one that sends the `last`.

    bills: how many clients send each.
    """
    messages = sum(count * sum(one.messages for one in bill) for count, bill in bills)
    messages_last = sum(one.messages for one in last)
    busy_s = sum(count * network.busy_s(bill) for count, bill in bills)
    station = Station("store")
    if messages <= MAX_MESSAGES:
        simulation, rng = Simulation(network.round_trip_s), random.Random(0)
        for count, bill in bills:
            for _ in range(count):
                simulation.start(_once(network, station, bill), rng.uniform(0, over_s))
        took_s, p99_s = max(0.0, simulation.run() - over_s), station.delay_s(0.99)
    else:
        took_s = max([busy_s - over_s, *(network.alone_s(bill) for _, bill in bills)])
        p99_s = took_s
    took_s += network.alone_s(last)
    total_s = over_s + took_s
    return Load(
        messages_per_s=(messages + messages_last) / total_s, utilisation=(busy_s + network.busy_s(last)) / total_s,
        p99_s=p99_s, took_s=took_s,
    )  # fmt: skip


def _once(network: Network, station: Station, bill: Sequence[Request]) -> Process:
    yield from network.pay(station, bill)
