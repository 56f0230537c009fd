"""Ranks meet, and are read, in a number of messages that grows with them and not with their square."""

from __future__ import annotations

import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from mas_hpc.distributed.many_keys import WINDOW, read_there, windows
from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.shared_tickets import BEAT_S, IDLE_S, SharedTickets, beat_s, next_phase
from mas_hpc.distributed.watchdog import _Rank
from mas_hpc.distributed.weight_channels import Members, read_texts
from mas_hpc.distributed.world import World
from mas_hpc.errors import RolloutError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from scaling.counted_store import CountedStore

SOON = timedelta(seconds=0.05)


def messages(store: CountedStore) -> int:
    return sum(request.messages for request in store.take_bill())


def test_windows_cover_everything_once() -> None:
    assert [len(window) for window in windows(range(130))] == [WINDOW, WINDOW, 2]
    assert [item for window in windows(range(130)) for item in window] == list(range(130))
    assert list(windows([])) == []


def test_those_that_are_there_are_read_in_their_order() -> None:
    store = HashStore()
    for number in (140, 3, 70):
        store.set(f"k{number}", str(number))
    assert read_there(store, [f"k{number}" for number in range(150)]) == {"k3": b"3", "k70": b"70", "k140": b"140"}
    assert read_there(store, []) == {}


def test_reading_a_thousand_takes_three_messages_a_window() -> None:
    store = CountedStore()
    for number in range(1000):
        store.set(str(number), "x")
    messages(store)
    assert len(read_there(store, [str(number) for number in range(1000)])) == 1000
    assert messages(store) == 3 * 16  # check, and multi_get's wait and answer, for each of 16 windows


def test_a_rank_that_has_not_come_is_named() -> None:
    store = HashStore()
    for rank in (4, 0, 2):
        arrive(store, "start", rank)
    assert absent(store, "start", 5, SOON) == [1, 3]
    arrive(store, "start", 3)
    arrive(store, "start", 1)
    assert absent(store, "start", 5, SOON) == []
    arrive(store, "end", 0)
    assert absent(store, "end", 2, SOON) == [1]


def test_each_rank_meets_any_number_of_others_in_three_messages() -> None:
    store = CountedStore()
    for rank in range(500):
        arrive(store, "start", rank)
    messages(store)
    arrive(store, "start", 500)
    assert absent(store, "start", 501, SOON) == []
    requests = store.take_bill()
    assert (sum(one.messages for one in requests), sum(one.keys for one in requests)) == (3, 3)


def test_ranks_that_wait_over_tcp_go_on_when_the_last_has_come() -> None:
    host = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    found: list[list[int]] = []

    def meet(rank: int) -> None:
        store = TCPStore("127.0.0.1", host.port, None, False, timedelta(seconds=10), wait_for_workers=False)
        arrive(store, "start", rank)
        found.append(absent(store, "start", 3, timedelta(seconds=10)))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    assert absent(host, "start", 3, SOON) == [2]
    assert found == []
    arrive(host, "start", 2)
    for thread in threads:
        thread.join()
    assert found == [[], []]


def test_receivers_are_read_together_and_those_that_are_missing_are_named() -> None:
    host = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    members = Members(rank=0, sender=0, receivers=tuple(range(1, 101)), timeout_s=0.05)
    for rank in range(1, 101):
        if rank not in (70, 99):
            host.set(f"ready/{rank}", f"from {rank}")
    with pytest.raises(RolloutError, match="waited for rank 70, 99 to be ready"):
        read_texts(host, "ready", members, "be ready")
    host.set("ready/70", "from 70")
    host.set("ready/99", "from 99")
    assert read_texts(host, "ready", members, "be ready") == {rank: f"from {rank}" for rank in range(1, 101)}


@pytest.mark.parametrize(("size", "beat", "idle", "watchdog"), [(12, BEAT_S, IDLE_S, 5.0), (120_000, 24.0, 12.0, 24.0)])
def test_many_ranks_give_fewer_signs_of_life_each(size: int, beat: float, idle: float, watchdog: float) -> None:
    store = CountedStore()
    tickets = SharedTickets(next_phase(store, 0, size, "test", 8), stall_s=300.0)
    assert (beat_s(size), tickets._beat_s, tickets._idle_s) == (beat, beat, idle)
    assert _Rank(World(size=size, launcher="mpi"), hang_s=1500.0, stall_s=300.0)._beat_s == watchdog
    hasty = SharedTickets(next_phase(store, 0, size, "test", 8), stall_s=8.0)
    assert hasty._beat_s == 1.0 and hasty._idle_s <= 1.0  # what is promised by stall_s goes before


def test_ranks_look_only_at_jobs_that_nobody_has_looked_at() -> None:
    store = CountedStore()
    first, second = (SharedTickets(next_phase(store, rank, 2, "test", 640), stall_s=300.0) for rank in range(2))
    while jobs := [*first.take(0, 640), *second.take(0, 640)]:
        assert {first.finish(job, b"") for job in jobs} == {True}
    first._next_look = second._next_look = first._next_beat = second._next_beat = 0.0
    messages(store)
    assert first.exhausted
    assert messages(store) == 1 + 1 + 10 + 1  # a sign of life, the frontier, ten windows of jobs, the new frontier
    assert second.exhausted
    assert messages(store) == 1 + 1
