"""Caches are prepared by one rank of each host while its others wait, in bounded time."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore

from mas_hpc.distributed.world import World
from mas_hpc.errors import LostPeerError, MasHpcError

PATIENCE = timedelta(minutes=60)
"""A model of hundreds of gigabytes may have to be fetched."""


def first_on_host(world: World, what: str, prepare: Callable[[], None], *, patience: timedelta = PATIENCE) -> None:
    """Let rank 0 prepare `what`, then the first rank of every other host, which may share its disk, and then go on together.

    Collective, once for each `what`. Raises what `prepare` raises where it ran, and LostPeerError elsewhere: it names the rank
    that failed, or has not prepared it within `patience`.
    """
    if world.store is None:
        prepare()
        return
    store = PrefixStore(f"caches/{what}", world.store)
    if world.local_rank:
        _wait(world, store, what, _leader(world), patience)
        return
    try:
        if not world.is_first:
            _wait(world, store, what, 0, patience)
        prepare()
    except MasHpcError as error:
        store.set(str(world.rank), json.dumps(str(error)))
        raise
    store.set(str(world.rank), json.dumps(""))


def _leader(world: World) -> int:
    """The first rank of this host: launchers number a host's ranks in order, but not always one after the other."""
    return world.hosts.index(world.hosts[world.rank])


def _wait(world: World, store: PrefixStore, what: str, rank: int, patience: timedelta) -> None:
    where = f"rank {rank} on {world.hosts[rank]}"
    try:
        store.wait([str(rank)], patience)
    except DistStoreError:
        raise LostPeerError(f"rank {world.rank} has waited {patience} for {what}, which {where} prepares; look there") from None
    if error := json.loads(store.get(str(rank))):
        raise LostPeerError(f"rank {world.rank} cannot go on: {where} could not prepare {what}: {error}")
