"""Short texts between ranks by way of the store: no collective, so a rank that has died holds nobody up."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore

from mas_hpc.distributed.many_keys import read_there
from mas_hpc.distributed.shared_tickets import gone_ranks
from mas_hpc.distributed.world import World
from mas_hpc.errors import LostPeerError


def tell_first(world: World, label: str, text: str, *, patience_s: float) -> dict[int, str]:
    """On rank 0 the texts of all ranks that told theirs within `patience_s`, by rank; elsewhere only this rank's.

    Every rank tells the same labels in the same order, but need not be there at once. A rank that was missing once, or was
    declared gone, is not waited for.
    """
    if world.store is None:
        return {world.rank: text}
    store = PrefixStore(f"notes/{label}", world.store)
    number = store.add(f"told/{world.rank}", 1)
    store.set(f"{number}/{world.rank}", text)
    if not world.is_first:
        return {world.rank: text}
    missed = set(world.store.get("notes/missed").decode().split()) if world.store.check(["notes/missed"]) else set()
    missed |= {str(rank) for rank in gone_ranks(world.store)}
    told = _within(store, [f"{number}/{rank}" for rank in range(world.size) if str(rank) not in missed], patience_s)
    found = read_there(store, [f"{number}/{rank}" for rank in range(world.size)])
    texts = {int(key.rpartition("/")[2]): said.decode() for key, said in found.items()}
    if not told:
        world.store.set("notes/missed", " ".join(str(rank) for rank in range(world.size) if rank not in texts))
    for rank in texts:
        store.delete_key(f"{number}/{rank}")
    return texts


def from_first(world: World, label: str, text: str, *, patience_s: float) -> str:
    """Rank 0's text on every rank; others give theirs for nothing. Raises LostPeerError when rank 0 does not come in time."""
    if world.store is None:
        return text
    store = PrefixStore(f"notes/{label}", world.store)
    key = f"said/{store.add(f'heard/{world.rank}', 1)}"
    if world.is_first:
        store.set(key, text)
        return text
    if not _within(store, [key], patience_s):
        silence = f"rank {world.rank} has heard nothing from rank 0 for {patience_s:g} s"
        raise LostPeerError(f"{label}: {silence}; look for its error")
    return store.get(key).decode()


def _within(store: PrefixStore, keys: list[str], patience_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=patience_s))
    except dist.DistStoreError:
        return False
    return True
