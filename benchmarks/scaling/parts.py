"""The parts of the control plane, each as what the product's own code asks of a store at a given number of clients.

A star has one station, which every rank asks. A tree has stations at several levels: what is asked of each is the same protocol
with the station's children as clients, so a part needs the number of clients and how many ranks each stands for, no more.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from scaling.counted_store import CountedStore, Request
from scaling.loads import Level, Load, Network, burst, repeat, steadily
from scaling.measure_store import RECORD_BYTES
from scaling.players import STALL_S, Players
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed import shared_tickets, supervisor, watchdog
from mas_hpc.distributed.heartbeats import Heartbeat, say
from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.notes import tell_first
from mas_hpc.distributed.shared_tickets import Phase, SharedTickets
from mas_hpc.distributed.weight_channels import Members
from mas_hpc.distributed.weight_source import HeldWeights
from mas_hpc.distributed.weight_sync import WeightSync
from mas_hpc.distributed.world import World

HANG_S = DistributedConfig().hang_s
ARRIVAL_S, LEAVE_S = 10.0, 0.1
"""Over which ranks that start come, and those that end a phase."""
NOTE_BYTES, HEADER_BYTES = 400, 30_000
"""Statistics of an engine; names and shapes of the tensors of a model of 8 billion weights."""
TENSORS = 3 * 291
"""Of such a model with Adam, of each of which every rank holds a shard under FSDP2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part, and what it may cost: a step is taken to last about a minute.

    Example: PARTS["notes"].holds(load)
    """

    what: str
    run: Callable[[Level, Network], Load]
    took_s: float = math.inf
    """Most that a burst, or a look at all clients, may take."""
    delay_s: float = math.inf
    """Most that 99% of the messages may wait."""
    busy: float = math.inf
    """Most of the time that its station may be busy."""

    def holds(self, load: Load) -> bool:
        """Whether a station with this load keeps up."""
        return load.took_s <= self.took_s and load.p99_s <= self.delay_s and load.utilisation <= self.busy


def _sizes(leaves: int) -> Callable[[str], int | None]:
    """Bytes of a record that stands for several ranks."""
    return lambda key: leaves * RECORD_BYTES if "beat/" in key or "Heartbeat/" in key else None


# ---- what goes on all the while


def heartbeats(level: Level, network: Network) -> Load:
    """The watchdog of every rank."""
    store = CountedStore(_sizes(level.leaves))
    world = World(rank=1, size=level.clients * level.leaves, launcher="mpi")
    rank = watchdog._Rank(world, hang_s=HANG_S, stall_s=STALL_S)
    rank._store = store
    rank._beat()
    bill, every_s, rng = store.take_bill(), rank._beat_s, random.Random(0)
    return steadily(
        network,
        lambda station: ((rng.uniform(0, every_s), repeat(network, station, bill, every_s)) for _ in range(level.clients)),
    )


def supervising(level: Level, network: Network) -> Load:
    """The supervisor reads every rank's signs of life; took_s is how long one look takes."""
    bill = look(level)
    took_s = network.alone_s(bill)
    period_s = max(took_s, shared_tickets.beat_s(level.clients))
    return Load(
        messages_per_s=sum(one.messages for one in bill) / period_s, utilisation=network.busy_s(bill) / period_s,
        p99_s=max(network.cost.of(one) / one.messages for one in bill), took_s=took_s,
    )  # fmt: skip


def look(level: Level) -> list[Request]:
    """What one look of the supervisor asks."""
    store = CountedStore(_sizes(level.leaves))
    for rank in range(level.clients):
        beat = Heartbeat(
            rank=rank, phase="train", step=1, count=1, beat=1, num_kept=0, stall_s=STALL_S, pid=1, host="x1", time_s=1.78e9
        )
        say(store, beat)
        store.set(f"tickets/beat/{rank}", shared_tickets.Record(phase=1, beat=1, stall_s=STALL_S, jobs=()).to_json())
    store.take_bill()
    ranks = SimpleNamespace(codes=lambda: [None] * level.clients)
    silences = shared_tickets.Silence(), shared_tickets.Silence()
    attempt: Any = SimpleNamespace(_ranks=ranks, _store=store, _silences=silences)
    assert len(supervisor._Attempt._silent(attempt)) == level.clients
    return store.take_bill()


def tickets(level: Level, network: Network) -> Load:
    """A phase of episodes; took_s is how long it goes on after the last of them has ended."""
    players = Players(level, network)
    ended_s, station = players.play(), players.station
    return Load(
        messages_per_s=station.num_served / ended_s, utilisation=station.busy_s / ended_s, p99_s=station.delay_s(0.99),
        took_s=ended_s - players.last_s,
    )  # fmt: skip


# ---- what comes once


def starting(level: Level, network: Network) -> Load:
    """Ranks meet; took_s counts from when the last has come."""
    store = CountedStore()
    for rank in range(level.clients):
        arrive(store, "start", rank)
    first = len(store.bill) // level.clients
    bill = store.take_bill()[:first]
    assert absent(store, "start", level.clients, timedelta(1)) == []
    return burst(network, [(level.clients, [*bill, *store.take_bill()])], over_s=ARRIVAL_S)


def notes(level: Level, network: Network) -> Load:
    """Every rank tells the first what its engine has done in a phase."""
    store = CountedStore(lambda key: level.leaves * NOTE_BYTES if key.rpartition("/")[2].isdigit() else None)
    bill: list[Request] = []
    told: dict[int, str] = {}
    for rank in reversed(range(level.clients)):
        store.take_bill()
        told = tell_first(World(rank=rank, size=level.clients, store=store), "play", "{}", patience_s=1.0)
        bill = bill if rank in (0, level.clients - 2) and bill else store.bill
    assert len(told) == level.clients
    return burst(network, [(level.clients - 1, bill)], over_s=LEAVE_S, last=store.take_bill())


def results(level: Level, network: Network) -> Load:
    """Every rank reads all traces of a step."""
    players = Players(level, network)
    count, store = len(players.lengths_s), players.store
    phase = Phase(number=1, label="play", count=count, rank=0, size=level.clients, store=store)
    own = SharedTickets(phase, stall_s=STALL_S, clock=lambda: 0.0)
    for job in range(count):
        own.finish(job, b"")
    own._num_handed_out = own._frontier = count
    store.take_bill()
    own.results()
    return burst(network, [(level.clients, store.take_bill())], over_s=LEAVE_S)


class _NoChannel:
    """Weights are not the control plane's."""

    def ring(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def post(self, block: Tensor) -> None: ...

    def wait(self, count: int) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


def weight_sync(level: Level, network: Network) -> Load:
    """The words of one push to the engine of every rank, without the weights."""
    store = CountedStore(lambda key: HEADER_BYTES if key.endswith("header") else None)
    clients = tuple(range(1, level.clients + 1))

    def sync(rank: int) -> WeightSync:
        return WeightSync(Members(rank=rank, sender=0, receivers=clients, timeout_s=1.0), _NoChannel(), store)

    store.set("push/1/header", '{"version": 1, "specs": []}')
    store.set("push/1/verdict", "")
    for rank in clients[:2]:
        store.take_bill()
        sync(rank).receive(lambda version, weights: "")
    bill = store.take_bill()
    for rank in clients:
        store.set(f"push/1/ready/{rank}", "")
        store.set(f"push/1/served/{rank}", json.dumps({"version": 1, "checksum": ""}))
    store.take_bill()
    sync(0).send(version=1, source=HeldWeights([]))
    return burst(network, [(level.clients, bill)], over_s=LEAVE_S, last=store.take_bill())


@cache
def plan_s(tensors: int) -> float:
    """Seconds of the first rank's Python for one rank's plan of a checkpoint, with a part of so many tensors."""
    plans, ranks = [], 4
    for rank in range(ranks):
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        planner.set_up_planner(
            {f"model.layers.{tensor}.weight.{rank}": torch.zeros(1) for tensor in range(tensors)}, None, True
        )
        plans.append(pickle.dumps(planner.create_local_plan()))
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    planner.set_up_planner({}, None, True)
    start_s = time.process_time()
    planner.create_global_plan([pickle.loads(plan) for plan in plans])  # noqa: S301 (made above)
    return (time.process_time() - start_s) / ranks


def checkpoint_plans(level: Level, network: Network) -> Load:
    """DCP's first rank gathers a plan of every rank, puts them together, and gathers what was written; over gloo, no store."""
    each_s = plan_s(TENSORS * level.leaves if level.leaves <= 12 else TENSORS * 12) * max(1.0, level.leaves / 12)
    took_s = level.clients * each_s
    return Load(messages_per_s=3 * level.clients / max(took_s, 1.0), utilisation=1.0, p99_s=took_s, took_s=took_s)


PARTS = {
    "heartbeats": Part(what="watchdogs, all the while", run=heartbeats, delay_s=1.0, busy=0.5),
    "supervising": Part(what="a look at every rank", run=supervising, took_s=1.0, busy=0.5),
    "starting": Part(what="ranks meet", run=starting, took_s=30.0),
    "notes": Part(what="statistics of a phase", run=notes, took_s=1.0),
    "results": Part(what="all traces to all ranks", run=results, took_s=1.0),
    "weight_sync": Part(what="a push to all engines, words only", run=weight_sync, took_s=1.0),
    "checkpoint_plans": Part(what="plans of a checkpoint, FSDP2", run=checkpoint_plans, took_s=10.0),
    "tickets": Part(what="a phase of episodes", run=tickets, took_s=3.0, delay_s=0.05, busy=0.5),
}


def levels(nodes: int, fan_out: Sequence[int], ranks_per_node: int = 12) -> list[Level]:
    """Stations of a tree from the bottom: (12, 64) has one a node and one for 64 nodes, beside the root; () is a star."""
    found, leaves, left = [], 1, nodes * ranks_per_node
    for width in fan_out:
        if left > width:
            found.append(Level(clients=width, leaves=leaves))
            leaves, left = leaves * width, -(-left // width)
    return [*found, Level(clients=left, leaves=leaves)]
