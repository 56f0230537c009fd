"""One rank a host prepares, the others wait for it, and a failure is told to who waits. Ranks are threads with one store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from mas_hpc.distributed.caches import first_on_host
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError, LostPeerError

TWO_HOSTS = ("a", "a", "b", "b")


def all_ranks(prepare: Callable[[int], None], *, absent: int | None = None) -> list[str]:
    """What each rank of two hosts ends with: the type and text of its error, or nothing."""
    store = HashStore()
    worlds = [
        World(rank=rank, size=4, local_rank=rank % 2, local_size=2, hosts=TWO_HOSTS, store=store, launcher="torchrun")
        for rank in range(4)
    ]

    def one(world: World) -> str:
        if world.rank == absent:
            return "absent"
        try:
            first_on_host(world, "the models", lambda: prepare(world.rank), patience=timedelta(seconds=0.5))
        except (ConfigError, LostPeerError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, worlds))


def test_rank_0_prepares_before_the_first_of_each_other_host_and_nobody_else_does() -> None:
    prepared: list[int] = []
    assert all_ranks(prepared.append) == [""] * 4
    assert prepared == [0, 2]


def test_one_rank_alone_prepares_for_itself() -> None:
    prepared = []
    first_on_host(World(), "the models", lambda: prepared.append(1))
    assert prepared == [1]


def test_a_failure_is_told_to_all_who_wait_and_said_by_who_had_it() -> None:
    def fail(rank: int) -> None:
        raise ConfigError("model.path='x': no such folder")

    own, *others = all_ranks(fail)
    assert own == "ConfigError: model.path='x': no such folder"
    for rank, other in enumerate(others, 1):
        where = "rank 2 on b" if rank == 3 else "rank 0 on a"
        assert other.startswith(f"LostPeerError: rank {rank} ") and where in other and "the models" in other


def test_a_failure_on_one_host_leaves_the_other_alone() -> None:
    def fail(rank: int) -> None:
        if rank == 2:
            raise ConfigError("disk full")

    first, second, third, fourth = all_ranks(fail)
    assert (first, second) == ("", "") and third == "ConfigError: disk full"
    assert fourth == "LostPeerError: rank 3 cannot go on: rank 2 on b could not prepare the models: disk full"


def test_who_waits_too_long_names_what_for_and_whom() -> None:
    told = all_ranks(lambda rank: None, absent=0)
    assert told[1] == "LostPeerError: rank 1 has waited 0:00:00.500000 for the models, which rank 0 on a prepares; look there"
    assert "rank 0 on a" in told[2] and "LostPeerError" in told[3]


def test_hosts_of_ranks_that_do_not_follow_each_other_have_their_leaders() -> None:
    store, prepared = HashStore(), []
    hosts = ("a", "b", "a", "b")
    base = World(size=4, local_size=2, hosts=hosts, store=store, launcher="torchrun")
    for rank in (0, 1, 2, 3):
        first_on_host(replace(base, rank=rank, local_rank=rank // 2), "data", lambda rank=rank: prepared.append(rank))
    assert prepared == [0, 1]
    with pytest.raises(LostPeerError, match="rank 0 on a"):
        first_on_host(replace(base, rank=2, local_rank=1), "other data", lambda: None, patience=timedelta(seconds=0.1))
