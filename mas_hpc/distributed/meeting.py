"""Ranks wait for each other by keys of the store, in bounded time, and know who has not come."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store


def arrive(store: Store, name: str, rank: int) -> None:
    """Say that this rank has come to `name`."""
    store.set(f"{name}/{rank}", "")


def absent(store: Store, name: str, size: int, timeout: timedelta) -> list[int]:
    """Wait until all ranks have come to `name`, at most `timeout`; those that have not."""
    arrived = PrefixStore(name, store)
    ranks = [str(rank) for rank in range(size)]
    try:
        arrived.wait(ranks, timeout)
    except DistStoreError:
        return [int(rank) for rank in ranks if not arrived.check([rank])]
    return []
