"""Keys and values that one row alone reads, in buffers that its new ones are written into: a decoding step copies nothing.

That is what the row has decoded and, where no other row reads it, its context before that: the products of attention over
a few columns cost little less than those over many, so that two buffers a row would be dearer than one.
Legend: L layers, 2 key and value, K key/value heads, B rows, N = B K, C columns of a buffer, W open ones, D head dimension,
T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mas_hpc.prefix_tree import IntArray
from mas_hpc.rollout.native.kv_pool import KVPool, KVShape

CAPACITY_STEP = 32
"""Columns that tails have to spare at most, and grow by when they are full: a copy every so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """What becomes a row: a context (slots of the pool), and behind it the last `count` columns of a row of other tails."""

    slot_T: IntArray
    tails: Tails | None = None
    row: int = 0
    count: int = 0
    num_decoded: int = 0

    def __len__(self) -> int:
        return len(self.slot_T) + self.count


class Tails:
    """Rows that end in the same column, which all write: one that is shorter, or came later, starts at a later column."""

    def __init__(self, sources: Sequence[Source], pool: KVPool, *, spare: int) -> None:
        self.width = max(map(len, sources))
        self._shape = pool.shape
        self._key_LBKCD, self._value_LBKCD = _buffers(pool.shape, len(sources), self.width + spare)
        self._start_B = [0] * len(sources)
        self._decoded_B = [0] * len(sources)
        self._fill(range(len(sources)), sources, pool)
        self._lay()

    @property
    def num_rows(self) -> int:
        """Rows that are there; their places are 0 to num_rows - 1."""
        return len(self._start_B)

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return len(self._key_LBKCD[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in (*self._key_LBKCD, *self._value_LBKCD))

    @property
    def padding(self) -> int:
        """Columns that are hidden, over all rows."""
        return sum(self._start_B) - self._first * self.num_rows

    def length(self, row: int) -> int:
        """Columns of a row."""
        return self.width - self._start_B[row]

    def num_decoded(self, row: int) -> int:
        """Its last columns, which it has decoded."""
        return self.width - self._decoded_B[row]

    def tokens(self, place_T: Sequence[tuple[int, int]]) -> Tensor:
        """Keys and values of decoded tokens, given by row and number since its context, [L, 2, K, T, D]."""
        row_T = torch.tensor([row for row, _ in place_T], device=self._shape.device)
        column_T = torch.tensor([self._decoded_B[row] + number for row, number in place_T], device=self._shape.device)
        pairs = zip(self._key_LBKCD, self._value_LBKCD, strict=True)
        return torch.stack([torch.stack([part[row_T, :, column_T].transpose(0, 1) for part in pair]) for pair in pairs])

    def replace(self, gone: Sequence[int], sources: Sequence[Source], pool: KVPool) -> list[int]:
        """Drop rows, and put others into the memory that is free; return which of the old rows, in this order, are left."""
        kept, dropped = list(range(self.num_rows)), set(gone)
        for place in sorted(gone):
            while kept and kept[-1] in dropped:
                kept.pop()
            if place < len(kept):
                kept[place] = kept.pop()
                for buffer in (*self._key_LBKCD, *self._value_LBKCD):
                    buffer[place] = buffer[kept[place]]
        places = range(len(kept), len(kept) + len(sources))
        assert places.stop <= self.capacity and all(len(source) <= self.width for source in sources)
        self._start_B = [self._start_B[row] for row in kept] + [0] * len(sources)
        self._decoded_B = [self._decoded_B[row] for row in kept] + [0] * len(sources)
        self._fill(places, sources, pool)
        self._lay()
        return kept

    def advance(self) -> None:
        """Open a column, to which each layer then writes."""
        if self.width == self._key_LBKCD[0].shape[2]:
            self._grow()
        self.width += 1

    def write(self, layer: int, key_BKD: Tensor, value_BKD: Tensor) -> None:
        """Fill the open column."""
        key_BKCD, value_BKCD = self._open_L[layer]
        key_BKCD.select(2, self.width - 1).copy_(key_BKD)
        value_BKCD.select(2, self.width - 1).copy_(value_BKD)

    def scores(self, layer: int, query_NQD: Tensor, scaling: float) -> Tensor:
        """Products with the keys, [N, Q, W]; -inf in columns before a row's."""
        key_NWD = self._flat_L[layer][0].narrow(1, self._first, self.width - self._first)
        if self._bias_N1C is None:
            return torch.bmm(query_NQD * scaling, key_NWD.mT)
        return torch.baddbmm(self._bias_N1C.narrow(2, self._first, key_NWD.shape[1]), query_NQD, key_NWD.mT, alpha=scaling)

    def weigh(self, layer: int, weight_NQW: Tensor) -> Tensor:
        """Weighted sums of the values, [N, Q, D]."""
        return torch.bmm(weight_NQW, self._flat_L[layer][1].narrow(1, self._first, weight_NQW.shape[2]))

    def _lay(self) -> None:
        """Prepare what is the same for all steps until rows come or go."""
        count, heads = self.num_rows, self._shape.heads
        self._first = min(self._start_B, default=0)
        self._open_L = [(key[:count], value[:count]) for key, value in zip(self._key_LBKCD, self._value_LBKCD, strict=True)]
        self._flat_L = [(key.flatten(0, 1), value.flatten(0, 1)) for key, value in self._open_L]
        self._bias_N1C = None
        if max(self._start_B, default=0) > self._first:
            column_C = torch.arange(self._key_LBKCD[0].shape[2], device=self._shape.device)
            hidden_BC = column_C < torch.tensor(self._start_B, device=column_C.device)[:, None]
            bias_BC = torch.zeros(hidden_BC.shape, dtype=self._shape.dtype, device=column_C.device)
            bias_BC.masked_fill_(hidden_BC, -torch.inf)
            self._bias_N1C = bias_BC.repeat_interleave(heads, 0)[:, None]

    def _grow(self) -> None:
        """Make room for more columns, one layer after the other: memory that one gives back serves the next."""
        count, first = self.num_rows, self._first
        width = self.width - first
        self._open_L, self._flat_L = [], []
        for layer in range(self._shape.layers):
            (key,), (value,) = _buffers(self._shape, count, width + CAPACITY_STEP, layers=1)
            key[:, :, :width] = self._key_LBKCD[layer][:count, :, first : self.width]
            value[:, :, :width] = self._value_LBKCD[layer][:count, :, first : self.width]
            self._key_LBKCD[layer], self._value_LBKCD[layer] = key, value
        self._start_B = [start - first for start in self._start_B]
        self._decoded_B = [start - first for start in self._decoded_B]
        self.width = width
        self._lay()

    def _fill(self, places: Sequence[int], sources: Sequence[Source], pool: KVPool) -> None:
        """Write rows, so that they end in the last open column."""
        for place, source in zip(places, sources, strict=True):
            self._start_B[place] = self.width - len(source)
            self._decoded_B[place] = self.width - source.num_decoded
        fresh = [(place, source) for place, source in zip(places, sources, strict=True) if len(source.slot_T)]
        others = defaultdict[Tails | None, list[tuple[int, Source]]](list)
        for place, source in zip(places, sources, strict=True):
            if not len(source.slot_T):
                others[source.tails].append((place, source))
        if fresh:
            self._fill_contexts(fresh, pool)
        for tails, rows in others.items():
            self._fill_columns(rows, tails)
        for place, source in fresh:
            if source.count:
                self._fill_columns([(place, source)], source.tails, is_behind=True)

    def _fill_contexts(self, rows: Sequence[tuple[int, Source]], pool: KVPool) -> None:
        slot_BW = np.empty((len(rows), self.width), dtype=np.int64)
        for slot_W, (_, source) in zip(slot_BW, rows, strict=True):
            slot_W[:] = source.slot_T[0]  # What is hidden must be finite: a weight of 0 does not hide nan.
            stop = self.width - source.count
            slot_W[stop - len(source.slot_T) : stop] = source.slot_T
        slot_T = torch.from_numpy(slot_BW.ravel()).to(self._shape.device)
        place_B = torch.tensor([place for place, _ in rows], device=self._shape.device)
        for layer, parts in enumerate(zip(self._key_LBKCD, self._value_LBKCD, strict=True)):
            for part, found_KTD in zip(parts, pool.read(layer, slot_T), strict=True):
                part[:, :, : self.width].index_copy_(0, place_B, found_KTD.unflatten(1, slot_BW.shape).transpose(0, 1))

    def _fill_columns(self, rows: Sequence[tuple[int, Source]], tails: Tails | None, *, is_behind: bool = False) -> None:
        """Copy the last columns of other tails; what lies before is nothing, or a context where these go `behind` one."""
        device = self._shape.device
        place_B = torch.tensor([place for place, _ in rows], device=device)
        row_B = torch.tensor([source.row for _, source in rows], device=device)
        count = max(source.count for _, source in rows)
        olds = zip(tails._key_LBKCD, tails._value_LBKCD, strict=True) if tails and count else None
        for parts in zip(self._key_LBKCD, self._value_LBKCD, strict=True):
            for part in parts if not is_behind else ():
                part[:, :, : self.width - count].index_fill_(0, place_B, 0)
            if olds is not None and tails is not None:
                for part, old in zip(parts, next(olds), strict=True):
                    found = old[:, :, tails.width - count : tails.width].index_select(0, row_B)
                    part[:, :, self.width - count : self.width].index_copy_(0, place_B, found)


def keys_are_turned(device: torch.device) -> bool:
    """Whether neighbours in memory are the columns of a key, and not its elements.

    So a CPU's BLAS reads both buffers from front to back. On an accelerator elements make rows of a multiple of 16 bytes.
    """
    return device.type == "cpu"


def _buffers(shape: KVShape, rows: int, columns: int, *, layers: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each layer, [B, K, C, D]."""
    like, numbers = torch.empty(0, dtype=shape.dtype, device=shape.device), range(shape.layers if layers is None else layers)
    values = [like.new_empty(rows, shape.heads, columns, shape.dim) for _ in numbers]
    if not keys_are_turned(shape.device):
        return [torch.empty_like(value) for value in values], values
    return [like.new_empty(rows, shape.heads, shape.dim, columns).mT for _ in numbers], values
