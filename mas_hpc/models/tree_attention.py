"""Attention along a forest of tokens: each attends to itself and its ancestors, and no T x T mask is ever built.

The forest is cut into blocks. A block is an interval of queries below one branching point; its keys are the tokens
above that point and the interval itself. Blocks of similar shape are padded into one call.
Legend: T tree tokens, H query heads, K key/value heads, D head dimension, B blocks of a batch, Q and P its padded
queries and keys, N padded rows of all batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from mas_hpc.prefix_tree import IntArray

Grid = np.ndarray[tuple[int, int], np.dtype[np.int64]]

BLOCK = 64
"""Subtrees of at most this many tokens share a block; larger ones are cut at their branching points."""
CHAIN = 256
"""Longest run of queries below a branching point in one block: bounds the masks and their unused upper triangles."""
PADDING = 0.25
"""Masked share of a batch, relative to its real part, that costs less than another call."""
PADDING_FLOOR = 8192
"""The same as a number of query-key pairs: what a call costs before it computes anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Queries start..stop attend to the tokens `above` and, as far as they are ancestors, to start..stop."""

    start: int
    stop: int
    above: IntArray
    causal: bool = False
    """A whole tree without branches: plain causal attention, which needs no mask."""

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return len(self.above) + self.num_queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Blocks that one call computes, padded to a common shape."""

    query_BQ: Grid
    """Tree indices; -1 is padding, here and in the keys."""
    key_BP: Grid
    visible_BQP: Tensor | None
    """None: causal."""


def cut(leave_T: IntArray, *, limit: int) -> list[Block]:
    """Cut a forest into blocks that hold each token once as a query; `leave_T` as in PrefixTree."""
    stop_T = _segment_stops(leave_T)
    blocks: list[Block] = []
    pending = [(start, stop, np.zeros(0, dtype=np.int64)) for start, stop in _siblings(leave_T, 0, len(leave_T))]
    while pending:
        start, stop, above = pending.pop()
        end = int(stop_T[start])
        causal = end == stop and not len(above)
        if causal or stop - start <= limit:
            blocks.append(Block(start=start, stop=stop, above=above, causal=causal))
            continue
        path = np.concatenate([above, np.arange(start, end)])
        for first in range(start, end, CHAIN):
            top = path[: len(above) + first - start]
            blocks.append(Block(start=first, stop=min(first + CHAIN, end), above=top))
        pending += [(first, last, path) for first, last in _packed(_siblings(leave_T, end, stop), limit)]
    return blocks


def _segment_stops(leave_T: IntArray) -> IntArray:
    """For each token, the end of its unbranched run, which the next token continues iff it is an only child."""
    continues_T = np.zeros(len(leave_T), dtype=bool)
    continues_T[1:] = (leave_T[1:] == leave_T[:-1]) & (np.arange(1, len(leave_T)) < leave_T[:-1])
    stops = np.append(np.flatnonzero(~continues_T)[1:], len(leave_T))
    return cast(IntArray, stops[np.cumsum(~continues_T) - 1])


def _siblings(leave_T: IntArray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        yield start, (leave := int(leave_T[start]))
        start = leave


def _packed(intervals: Iterator[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Join neighbours greedily up to `limit` tokens."""
    packed: list[tuple[int, int]] = []
    for start, stop in intervals:
        if packed and stop - packed[-1][0] <= limit:
            packed[-1] = (packed[-1][0], stop)
        else:
            packed.append((start, stop))
    return packed


def batched(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group blocks so that padding each group to its largest member costs little."""
    groups: list[list[Block]] = []
    num_queries = num_keys = real = 0
    for block in sorted(blocks, key=lambda block: (block.causal, block.num_keys, block.num_queries), reverse=True):
        wide, deep = max(num_queries, block.num_queries), max(num_keys, block.num_keys)
        area = real + block.num_queries * block.num_keys
        padding = (len(groups[-1]) + 1) * wide * deep - area if groups else 0
        if groups and groups[-1][0].causal == block.causal and padding <= PADDING * area + PADDING_FLOOR:
            groups[-1].append(block)
            num_queries, num_keys, real = wide, deep, area
        else:
            groups.append([block])
            num_queries, num_keys = block.num_queries, block.num_keys
            real = num_queries * num_keys
    return groups


def _batch(blocks: Sequence[Block], leave_T: IntArray) -> Batch:
    query_BQ = np.full((len(blocks), max(block.num_queries for block in blocks)), -1)
    key_BP = np.full((len(blocks), max(block.num_keys for block in blocks)), -1)
    for row, block in enumerate(blocks):
        query_BQ[row, : block.num_queries] = np.arange(block.start, block.stop)
        key_BP[row, : len(block.above)] = block.above
        key_BP[row, len(block.above) : block.num_keys] = query_BQ[row, : block.num_queries]
    if blocks[0].causal:
        return Batch(query_BQ=query_BQ, key_BP=key_BP, visible_BQP=None)
    # A padded query repeats its block's first one, so that no row of the mask is empty (a softmax over nothing is nan).
    query_BQ1 = np.where(query_BQ < 0, query_BQ[:, :1], query_BQ)[:, :, None]
    key_B1P = key_BP[:, None, :]
    visible_BQP = (key_B1P >= 0) & (key_B1P <= query_BQ1) & (query_BQ1 < leave_T[key_B1P])
    return Batch(query_BQ=query_BQ, key_BP=key_BP, visible_BQP=torch.from_numpy(visible_BQP))


class TreeAttention:
    """An `Attend` over one forest; planned once, used by every layer, in recomputation and in the backward pass.

    Example: TreeAttention(merge([[1, 2, 3], [1, 2, 4]]).leave_T)
    """

    def __init__(self, leave_T: IntArray | Tensor, *, limit: int = BLOCK, device: torch.device | str = "cpu") -> None:
        leave_T = np.asarray(leave_T.cpu() if isinstance(leave_T, Tensor) else leave_T)
        batches = [_batch(group, leave_T) for group in batched(cut(leave_T, limit=limit))]
        query_N = np.concatenate([batch.query_BQ.ravel() for batch in batches])
        key_N = np.concatenate([batch.key_BP.ravel() for batch in batches])
        real = np.flatnonzero(query_N >= 0)
        self._query_N, self._key_N = (_gather_index(index, len(leave_T), device) for index in (query_N, key_N))
        self._place_T = _gather_index(real[np.argsort(query_N[real])], len(query_N), device)
        self._query_shapes = [batch.query_BQ.shape for batch in batches]
        self._key_shapes = [batch.key_BP.shape for batch in batches]
        self._visible = [batch.visible_BQP for batch in batches]
        self._device = device
        self._bias: list[Tensor | None] = []

    def __call__(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [T, H, D]."""
        queries = _heads(query_HTD, self._query_N, self._query_shapes)
        keys, values = (_heads(heads, self._key_N, self._key_shapes) for heads in (key_KTD, value_KTD))
        outputs = [
            scaled_dot_product_attention(query, key, value, bias, 0.0, bias is None, scale=scaling, enable_gqa=True)
            for query, key, value, bias in zip(queries, keys, values, self._biases(query_HTD.dtype), strict=True)
        ]
        rows = [output_BHQD.transpose(1, 2).flatten(0, 1).flatten(1) for output_BHQD in outputs]
        return _gather(torch.cat(rows), self._place_T).unflatten(1, (len(query_HTD), -1))

    def _biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Additive masks: of a boolean one every layer would keep its own converted copy for the backward pass."""
        if not self._bias or any(bias is not None and bias.dtype != dtype for bias in self._bias):
            self._bias = [None if seen is None else _bias(seen, dtype).to(self._device) for seen in self._visible]
        return self._bias


def _bias(visible_BQP: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible_BQP.shape, dtype=dtype).masked_fill_(~visible_BQP, -torch.inf)[:, None]


def _gather_index(index: IntArray, num_rows: int, device: torch.device | str) -> Tensor | None:
    """None when it takes each of `num_rows` rows in order. Padding takes row 0, which the masks hide."""
    if np.array_equal(index, np.arange(num_rows)):
        return None
    return torch.from_numpy(np.maximum(index, 0)).to(device)


def _heads(heads_XTD: Tensor, index_N: Tensor | None, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The rows of each batch, [B, heads, Q or P, D]."""
    rows = _gather(heads_XTD.transpose(0, 1).flatten(1), index_N).split([count * width for count, width in shapes])
    return [part.view(*shape, len(heads_XTD), -1).transpose(1, 2) for part, shape in zip(rows, shapes, strict=True)]


def _gather(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else embedding(index, rows)  # on a CPU index_select has a far slower backward
