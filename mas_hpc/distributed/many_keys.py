"""Many keys of a store in few messages: one after the other, those of 100,000 ranks would take as many round trips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch.distributed import Store

WINDOW = 64
"""Keys of one message: bounds its size, and how long the store serves nobody else."""
Item = TypeVar("Item")


def windows(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items, WINDOW at a time."""
    return (items[start : start + WINDOW] for start in range(0, len(items), WINDOW))


def read_there(store: Store, keys: Sequence[str]) -> dict[str, bytes]:
    """The values of those keys that are there, in their order; two calls a window where all are."""
    found: dict[str, bytes] = {}
    for window in windows(keys):
        there = window if store.check(list(window)) else [key for key in window if store.check([key])]
        found |= dict(zip(there, store.multi_get(list(there)), strict=True)) if there else {}
    return found
