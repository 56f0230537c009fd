"""Every job counts once, whatever takes, finishes, deaths, stalls and returns happen, between any two words with the store."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, Store

from mas_hpc.distributed.shared_tickets import SharedTickets, declare_gone, next_phase, read_records, supply
from mas_hpc.distributed.tickets import LocalTickets, open_tickets
from mas_hpc.distributed.world import World
from mas_hpc.errors import RolloutError

STALL_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Died(BaseException):
    pass


class Watched:
    """A store that calls `before` and `after` around every word with it."""

    def __init__(self, store: Store, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.store, self.before, self.after = store, before, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)

        def call(*arguments: Any) -> Any:
            self.before()
            result = method(*arguments)
            self.after()
            return result

        return call


def tickets_of(store: Store, rank: int, size: int, count: int, clock: Clock, label: str = "test") -> SharedTickets:
    return SharedTickets(next_phase(store, rank, size, label, count), stall_s=STALL_S, clock=clock)


@dataclass
class Rank:
    tickets: SharedTickets
    capacity: int
    live: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    played: list[int] = field(default_factory=list)
    is_dead: bool = False
    is_busy: bool = False
    """Inside a call: it cannot be entered again, as a stopped process cannot."""
    results: list[bytes] | None = None


class Simulation:
    """Ranks that play jobs over one store. Rank 0 never dies; every other may die or stall before or after any word."""

    def __init__(self, seed: int, *, faults: bool, declares: bool = True) -> None:
        self.random = random.Random(seed)
        self.count = self.random.choice([1, 5, 40, 150])
        self.size = self.random.randint(2, 5)
        self.death_rate, self.stall_rate = (0.002, 0.02) if faults else (0.0, 0.0)
        self.declares = declares
        self.clock, self.store = Clock(), HashStore()
        self.ranks: list[Rank] = []
        for rank in range(self.size):
            phase = next_phase(self.store, rank, self.size, "test", self.count)
            watched: Any = Watched(phase.store, lambda rank=rank: self.disturb(rank), lambda rank=rank: self.disturb(rank))
            tickets = SharedTickets(phase, stall_s=STALL_S, clock=self.clock)
            tickets._store = watched
            self.ranks.append(Rank(tickets, self.random.randint(1, 30)))

    def disturb(self, number: int) -> None:
        if number and self.random.random() < self.death_rate:
            self.ranks[number].is_dead = True
            if self.declares and self.random.random() < 0.5:
                declare_gone(self.store, number)
            raise Died
        if self.random.random() < self.stall_rate:
            self.clock.now += self.random.uniform(0, 1.5 * STALL_S)
            for _ in range(self.random.randint(1, 10)):
                self.step(self.random.randrange(self.size))

    def step(self, number: int) -> None:
        rank = self.ranks[number]
        if rank.is_dead or rank.is_busy or rank.results is not None:
            return
        rank.is_busy = True
        try:
            self.play(number, rank)
        except Died:
            pass
        finally:
            rank.is_busy = False

    def play(self, number: int, rank: Rank) -> None:
        if rank.tickets.exhausted:
            rank.results = rank.tickets.results()
            return
        room = rank.capacity - len(rank.live)
        taken = rank.tickets.take(len(rank.live), room)
        assert len(taken) <= room
        rank.live += taken
        rank.played += taken
        for job in self.random.sample(rank.live, self.random.randint(0, min(3, len(rank.live)))):
            rank.live.remove(job)
            if rank.tickets.finish(job, f"{job} by {number}".encode()):
                rank.counted.append(job)

    def run(self) -> None:
        for _ in range(100_000):
            self.clock.now += self.random.uniform(0, 0.5)
            self.step(self.random.randrange(self.size))
            if all(rank.is_dead or rank.results is not None for rank in self.ranks):
                return
        raise AssertionError(f"not finished at {self.clock.now}: {[rank.live for rank in self.ranks]}")


@pytest.mark.parametrize("faults", [False, True])
def test_every_job_counts_exactly_once(faults: bool) -> None:
    deaths = doubles = 0
    for seed in range(150):
        simulation = Simulation(seed, faults=faults)
        simulation.run()
        counted = [job for rank in simulation.ranks for job in rank.counted]
        assert len(counted) == len(set(counted)), seed
        results = [rank.results for rank in simulation.ranks if rank.results is not None]
        assert all(other == results[0] for other in results), seed
        assert [int(result.split()[0]) for result in results[0]] == list(range(simulation.count)), seed
        for number, rank in enumerate(simulation.ranks):
            assert all(results[0][job] == f"{job} by {number}".encode() for job in rank.counted), seed
        played = [job for rank in simulation.ranks for job in rank.played]
        deaths += sum(rank.is_dead for rank in simulation.ranks)
        doubles += len(played) - simulation.count
        assert faults or sorted(played) == list(range(simulation.count)), seed
        assert faults or simulation.store.num_keys() == 2 * simulation.size, seed  # records and counts of phases
    assert not faults or (deaths > 50 and doubles > 500)  # the drill was one


def test_what_was_not_written_down_before_a_death_is_found() -> None:
    clock, store = Clock(), HashStore()
    phase = next_phase(store, 1, 2, "test", 4)
    words = iter(range(100))

    def die_after_the_counter() -> None:
        if next(words) == 1:  # the counter was read, and then raised
            raise Died

    dying = SharedTickets(phase, stall_s=STALL_S, clock=clock)
    dying._store = Watched(phase.store, lambda: None, die_after_the_counter)  # type: ignore[assignment]
    dying._next_beat = clock.now + 1
    with pytest.raises(Died):
        dying.take(0, 4)
    first = tickets_of(store, 0, 2, 4, clock)
    done: list[int] = []
    for _ in range(200):
        for job in first.take(0, 4):
            assert first.finish(job, b"")
            done.append(job)
        clock.now += 0.5
    assert sorted(done) == [0, 1, 2, 3]
    assert first.exhausted


def test_a_rank_declared_gone_is_not_waited_for() -> None:
    clock, store = Clock(), HashStore()
    ranks = [tickets_of(store, rank, 2, 10, clock) for rank in range(2)]
    lost, kept = (tickets.take(0, 100) for tickets in ranks)
    kept += ranks[1].take(len(kept), 100)
    declare_gone(store, 0)
    while len(kept) < 10:
        clock.now += 5.0
        assert clock.now < 100 + STALL_S * 4
        kept += ranks[1].take(0, 100)
    assert sorted(kept) == list(range(10))
    assert set(lost) < set(kept)


def test_only_one_of_two_ranks_that_notice_a_death_takes_the_jobs() -> None:
    clock, store = Clock(), HashStore()
    ranks = [tickets_of(store, rank, 3, 3, clock) for rank in range(3)]
    assert [job for _ in range(3) for job in ranks[0].take(0, 1)] == [0, 1, 2]
    declare_gone(store, 0)
    words = []

    def let_the_other_take_them() -> None:
        words.append(None)
        if len(words) == 5:  # between reading the record and taking its jobs: gone twice, check, multi_get
            taken.extend(ranks[2].take(0, 2))

    taken: list[int] = []
    for tickets in ranks[1:]:
        tickets._num_handed_out, tickets._next_beat = 3, clock.now + 1
    ranks[1]._store = Watched(ranks[1]._store, let_the_other_take_them, lambda: None)  # type: ignore[assignment]
    assert ranks[1].take(0, 3) == []
    assert taken == [0, 1]
    clock.now += STALL_S / 4
    assert ranks[1].take(0, 3) == [2]


def test_a_rank_that_comes_back_is_refused_and_can_still_read_everything() -> None:
    clock, store = Clock(), HashStore()
    first, second = (tickets_of(store, rank, 2, 2, clock) for rank in range(2))
    assert first.take(0, 5) == [0]
    assert second.take(0, 5) == [1]
    assert second.finish(1, b"one")
    taken: list[int] = []
    while not taken:
        clock.now += 1.0
        assert not second.exhausted
        taken = second.take(0, 5)
    assert STALL_S <= clock.now - 100.0 <= 1.5 * STALL_S + 2
    assert taken == [0]
    assert second.finish(0, b"zero by the second")
    assert second.exhausted
    assert second.results() == [b"zero by the second", b"one"]
    assert not first.finish(0, b"zero by the first")
    assert first.exhausted
    assert first.results() == [b"zero by the second", b"one"]


def test_a_rank_that_gives_signs_of_life_keeps_its_jobs_for_ever() -> None:
    clock, store = Clock(), HashStore()
    first, second = (tickets_of(store, rank, 2, 2, clock) for rank in range(2))
    assert first.take(0, 5) == [0]
    assert second.take(0, 5) == [1]
    assert second.finish(1, b"")
    for _ in range(100):
        clock.now += STALL_S / 4
        assert not first.exhausted
        assert second.take(0, 5) == []


def test_keys_of_a_phase_go_when_the_living_have_read_it() -> None:
    clock, store = Clock(), HashStore()
    for label in ("before", "after", "after"):
        ranks = [tickets_of(store, rank, 3, 70, clock, label) for rank in range(3)]
        for job in [job for tickets in ranks[:2] for _ in range(70) for job in tickets.take(0, 1)]:
            assert ranks[0].finish(job, b"x")
        for tickets in ranks:
            tickets._num_handed_out = 70
        assert [len(tickets.results()) for tickets in ranks[:2]] == [70, 70]
        assert store.check([f"tickets/{ranks[0]._phase.number}/won/69"])
        assert len(ranks[2].results()) == 70
    assert store.num_keys() == 6
    declare_gone(store, 2)
    ranks = [tickets_of(store, rank, 3, 0, clock, "later") for rank in range(2)]
    assert [tickets.results() for tickets in ranks] == [[], []]
    assert store.num_keys() == 7


def test_a_record_says_what_the_supervisor_needs() -> None:
    clock, store = Clock(), HashStore()
    assert read_records(store, [0, 1]) == {}
    tickets = tickets_of(store, 0, 2, 8, clock)
    jobs = tickets.take(0, 100)
    record = read_records(store, [0, 1])[0]
    assert (record.phase, record.jobs, record.stall_s) == (1, tuple(jobs), STALL_S)
    clock.now += 1.0
    assert not tickets.exhausted
    later = read_records(store, [0])[0]
    assert later == replace(record, beat=record.beat + 1)


def test_a_rank_is_supplied_with_most_of_its_share_and_the_last_jobs_one_by_one() -> None:
    assert supply(live=0, finished=0, unassigned=64, count=64, size=2) == 29  # of 32
    assert supply(live=29, finished=0, unassigned=35, count=64, size=2) == 0  # the rest is for the other
    assert supply(live=0, finished=0, unassigned=35, count=64, size=2) == 29  # which gets as many
    assert supply(live=19, finished=10, unassigned=6, count=64, size=2) == 1  # 20 of a share of 22
    assert supply(live=4, finished=60, unassigned=10, count=128, size=2) == 3  # the other is slower: 7 of 7
    assert supply(live=1, finished=63, unassigned=1, count=128, size=2) == 0
    assert supply(live=0, finished=64, unassigned=1, count=128, size=2) == 1
    assert supply(live=0, finished=0, unassigned=1, count=1, size=64) == 1
    assert supply(live=3, finished=0, unassigned=0, count=64, size=2) == 0


def test_one_rank_gets_everything_that_it_has_room_for() -> None:
    tickets = open_tickets(World(), "test", 5, stall_s=1.0)
    assert isinstance(tickets, LocalTickets)
    assert tickets.take(0, 3) == [0, 1, 2]
    assert tickets.take(3, 0) == []
    assert tickets.take(3, 9) == [3, 4]
    for job in (4, 3, 2, 1, 0):
        assert not tickets.exhausted
        assert tickets.finish(job, str(job).encode())
    assert tickets.exhausted
    assert tickets.results() == [b"0", b"1", b"2", b"3", b"4"]


def test_ranks_that_play_different_phases_are_told_apart() -> None:
    store = HashStore()
    next_phase(store, 0, 2, "before", 8)
    with pytest.raises(AssertionError, match=r"rank 1 plays .*after.* while another plays .*before"):
        next_phase(store, 1, 2, "after", 8)


HOST = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


def test_over_tcp_and_a_store_that_has_gone_is_named() -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout
    port = int(host.stdout.readline())
    clients = [dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20)) for _ in range(2)]
    ranks = [open_tickets(World(rank=r, size=2, store=store), "test", 3, stall_s=STALL_S) for r, store in enumerate(clients)]
    for job in [*ranks[0].take(0, 9), *ranks[1].take(0, 9)]:
        assert ranks[job % 2].finish(job, bytes([job, 255, 0]))
    for job in ranks[0].take(0, 9):
        assert ranks[0].finish(job, bytes([job, 255, 0]))
    assert ranks[1].take(0, 9) == []
    assert [tickets.exhausted for tickets in ranks] == [True, True]
    assert [tickets.results() for tickets in ranks] == [[bytes([job, 255, 0]) for job in range(3)]] * 2
    tickets = open_tickets(World(rank=0, size=2, store=clients[0]), "later", 3, stall_s=STALL_S)
    host.kill()
    host.wait()
    with pytest.raises(RolloutError, match=rf"later: rank 0 has lost the store of the ranks at 127\.0\.0\.1:{port}"):
        for _ in range(2):  # the first word after a death may still be swallowed by the system
            tickets.take(0, 1)
            tickets.finish(0, b"")
