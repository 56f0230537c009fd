"""Attention along a forest of tokens: each attends to itself and its ancestors, and no T x T mask is ever built.

The forest is cut into blocks. A block is an interval of tokens below one branching point; its keys are the tokens above
that point and the interval itself, its queries those of the interval that are asked for. Blocks of similar shape are
padded into one call.
Legend: T tree tokens, M those that a query descends from, N queries, H query heads, K key/value heads, D head dimension,
B blocks of a batch, Q and P its padded queries and keys, X padded rows of all batches.
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
"""Subtrees of at most this many tokens share a block; larger ones are cut at their branching points.

What counts is tokens times queries, at most BLOCK squared: a larger subtree with few queries is one block too.
"""
CHAIN = 256
"""Longest run of queries below a branching point in one block: bounds the masks and their unused upper triangles."""
PADDING = 0.25
"""Masked share of a batch, relative to its real part, that costs less than another call."""
PADDING_FLOOR = 8192
"""The same as a number of query-key pairs: what a call costs before it computes anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """These queries attend to those of these keys that are their ancestors or themselves. Both are increasing indices."""

    queries: IntArray
    keys: IntArray
    causal: bool = False
    """A whole tree without branches, each token a query: plain causal attention, which needs no mask."""

    @property
    def num_queries(self) -> int:
        return len(self.queries)

    @property
    def num_keys(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Blocks that one call computes, padded to a common shape."""

    query_BQ: Grid
    """Tree indices; -1 is padding, here and in the keys."""
    key_BP: Grid
    visible_BQP: Tensor | None
    """None: causal."""


def cut(leave_T: IntArray, query_N: IntArray, *, limit: int) -> list[Block]:
    """Cut a forest into blocks that hold each query once; `leave_T` as in PrefixTree, `query_N` increases.

    Every leaf must be a query (`pruned` sees to that): then all tokens are keys of somebody.
    """
    stop_T = _segment_stops(leave_T)
    first_T1 = np.searchsorted(query_N, np.arange(len(leave_T) + 1))
    blocks: list[Block] = []
    pending = [(start, stop, np.zeros(0, dtype=np.int64)) for start, stop in _siblings(leave_T, 0, len(leave_T))]
    while pending:
        start, stop, above = pending.pop()
        end = int(stop_T[start])
        query_Q = query_N[first_T1[start] : first_T1[stop]]
        causal = end == stop and not len(above) and len(query_Q) == stop - start
        if causal or (stop - start) * len(query_Q) <= limit**2:
            keys = np.concatenate([above, np.arange(start, stop)])
            blocks.append(Block(queries=query_Q, keys=keys, causal=causal))
            continue
        path = np.concatenate([above, np.arange(start, end)])
        run_Q = query_N[first_T1[start] : first_T1[end]]
        for first in range(0, len(run_Q), CHAIN):
            queries = run_Q[first : first + CHAIN]
            blocks.append(Block(queries=queries, keys=path[: len(above) + int(queries[-1]) + 1 - start]))
        pending += [(first, last, path) for first, last in _packed(_siblings(leave_T, end, stop), first_T1, limit)]
    return blocks


def pruned(leave_T: IntArray, query_N: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Drop the tokens that no query descends from.

    Returns the indices of the others, and their `leave_T` and the queries in the indices of the smaller forest.
    """
    first_T1 = np.searchsorted(query_N, np.arange(len(leave_T) + 1))
    needed_T = first_T1[leave_T] > first_T1[:-1]
    index_T1 = np.append(0, np.cumsum(needed_T))
    kept = np.flatnonzero(needed_T)
    return kept, index_T1[leave_T[kept]], index_T1[query_N]


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


def _packed(intervals: Iterator[tuple[int, int]], first_T1: IntArray, limit: int) -> list[tuple[int, int]]:
    """Join neighbours greedily up to `limit` tokens, or more if few of them are queries."""
    packed: list[tuple[int, int]] = []
    for start, stop in intervals:
        if packed and (stop - packed[-1][0]) * int(first_T1[stop] - first_T1[packed[-1][0]]) <= limit**2:
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
        query_BQ[row, : block.num_queries] = block.queries
        key_BP[row, : block.num_keys] = block.keys
    if blocks[0].causal:
        return Batch(query_BQ=query_BQ, key_BP=key_BP, visible_BQP=None)
    # A padded query repeats its block's first one, so that no row of the mask is empty (a softmax over nothing is nan).
    query_BQ1 = np.where(query_BQ < 0, query_BQ[:, :1], query_BQ)[:, :, None]
    key_B1P = key_BP[:, None, :]
    visible_BQP = (key_B1P >= 0) & (key_B1P <= query_BQ1) & (query_BQ1 < leave_T[key_B1P])
    return Batch(query_BQ=query_BQ, key_BP=key_BP, visible_BQP=torch.from_numpy(visible_BQP))


class TreeAttention:
    """An `Attend` over one forest; planned once, used by every layer, in recomputation and in the backward pass.

    `queries` are the tree indices that attend, increasing: the rows of the queries and of the output. All tokens are keys.

    Example: TreeAttention(merge([[1, 2, 3], [1, 2, 4]]).leave_T)
    """

    def __init__(
        self, leave_T: IntArray | Tensor, *, queries: IntArray | None = None, limit: int = BLOCK,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        leave_T = np.asarray(leave_T.cpu() if isinstance(leave_T, Tensor) else leave_T)
        kept, leave_M, query_N = pruned(leave_T, np.arange(len(leave_T)) if queries is None else queries)
        batches = [_batch(group, leave_M) for group in batched(cut(leave_M, query_N, limit=limit))]
        query_X = np.concatenate([batch.query_BQ.ravel() for batch in batches])
        key_X = np.concatenate([batch.key_BP.ravel() for batch in batches])
        real = np.flatnonzero(query_X >= 0)
        self._query_X = _gather_index(np.searchsorted(query_N, query_X), len(query_N), device)
        self._key_X = _gather_index(kept[key_X], len(leave_T), device)
        self._place_N = _gather_index(real[np.argsort(query_X[real])], len(query_X), device)
        self._query_shapes = [batch.query_BQ.shape for batch in batches]
        self._key_shapes = [batch.key_BP.shape for batch in batches]
        self._visible = [batch.visible_BQP for batch in batches]
        self._device = device
        self._bias: list[Tensor | None] = []

    def __call__(self, layer: int, query_HND: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [N, H, D]."""
        queries = _heads(query_HND, self._query_X, self._query_shapes)
        keys, values = (_heads(heads, self._key_X, self._key_shapes) for heads in (key_KTD, value_KTD))
        outputs = [
            scaled_dot_product_attention(query, key, value, bias, 0.0, bias is None, scale=scaling, enable_gqa=True)
            for query, key, value, bias in zip(queries, keys, values, self._biases(query_HND.dtype), strict=True)
        ]
        rows = [output_BHQD.transpose(1, 2).flatten(0, 1).flatten(1) for output_BHQD in outputs]
        return _gather(torch.cat(rows), self._place_N).unflatten(1, (len(query_HND), -1))

    def _biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Additive masks: of a boolean one every layer would keep its own converted copy for the backward pass."""
        if not self._bias or any(bias is not None and bias.dtype != dtype for bias in self._bias):
            self._bias = [None if seen is None else _bias(seen, dtype).to(self._device) for seen in self._visible]
        return self._bias


def _bias(visible_BQP: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible_BQP.shape, dtype=dtype).masked_fill_(~visible_BQP, -torch.inf)[:, None]


def _gather_index(index: IntArray, num_rows: int, device: torch.device | str) -> Tensor | None:
    """None when it takes each of `num_rows` rows in order."""
    if np.array_equal(index, np.arange(num_rows)):
        return None
    return torch.from_numpy(index).to(device)


def _heads(heads_YTD: Tensor, index_X: Tensor | None, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The rows of each batch, [B, heads, Q or P, D]."""
    rows = _gather(heads_YTD.transpose(0, 1).flatten(1), index_X).split([count * width for count, width in shapes])
    return [part.view(*shape, len(heads_YTD), -1).transpose(1, 2) for part, shape in zip(rows, shapes, strict=True)]


def _gather(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else embedding(index, rows)  # on a CPU index_select has a far slower backward
