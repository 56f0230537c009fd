"""Ranks wait for each other by keys of the store, in bounded time, and know who has not come.

Whoever comes as number n sets key n, and all wait for the last number alone: each for all keys would be quadratic in the ranks.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store

from mas_hpc.distributed.many_keys import read_there


def arrive(store: Store, name: str, rank: int) -> None:
    """Say that this rank has come to `name`, once."""
    place = PrefixStore(name, store)
    place.set(str(place.add("count", 1)), str(rank))


def absent(store: Store, name: str, size: int, timeout: timedelta) -> list[int]:
    """Wait until all ranks have come to `name`, at most `timeout`; those that have not."""
    place = PrefixStore(name, store)
    try:
        place.wait([str(size)], timeout)
    except DistStoreError:
        came = {int(rank) for rank in read_there(place, [str(number) for number in range(1, size + 1)]).values()}
        return [rank for rank in range(size) if rank not in came]
    return []
