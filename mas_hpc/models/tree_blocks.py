"""How a forest of tokens is cut into calls of attention: each token attends to itself and its ancestors.

An unbranched run of tokens that many others descend from is a prefix: in depth-first order those others are one slice, all
of them see all of it, and so one call without a mask serves them. What is left is cut into blocks. A block is an interval
of tokens below one branching point; its keys are the tokens above that point that are in no prefix, and the interval
itself; its queries are those of the interval that are asked for. Blocks of similar shape are padded into one call.
Legend: T tree tokens, M those that a query descends from, N queries, B blocks of a batch, Q and P its padded queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mas_hpc.prefix_tree import IntArray

Grid = np.ndarray[tuple[int, int], np.dtype[np.int64]]

BLOCK = 64
"""Subtrees of at most this many tokens share a block; larger ones are cut at their branching points.

What counts is tokens times queries, at most BLOCK squared: a larger subtree with few queries is one block too.
"""
CHAIN = 256
"""Longest run of queries below a branching point in one block: bounds the masks and their unused upper triangles."""
SHARED = 128
"""Fewest tokens of a prefix, and fewest queries that see it.

A call of its own costs each query as much as 60 further keys; for that it saves masks, copies of the keys in every block, and
the time that products of few queries lose.
"""
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
    """An unbranched run, each token a query, and nothing above: plain causal attention, which needs no mask."""

    @property
    def num_queries(self) -> int:
        return len(self.queries)

    @property
    def num_keys(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """These keys are ancestors of all the queries from `first` to `last` (excluded; places in `query_N`)."""

    keys: IntArray
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Blocks that one call computes, padded to a common shape."""

    query_BQ: Grid
    """Tree indices; -1 is padding, here and in the keys."""
    key_BP: Grid
    visible_BQP: Tensor | None
    """None: causal."""


def cut(leave_T: IntArray, query_N: IntArray, *, limit: int, shared: int) -> tuple[list[Block], list[Prefix]]:
    """Cut a forest into blocks that hold each query once, and the prefixes of those queries.

    `leave_T` as in PrefixTree; `query_N` increases. Every leaf must be a query (`pruned` sees to that): then all tokens are
    keys of somebody. A prefix comes before those below it.
    """
    stop_T = _segment_stops(leave_T)
    first_T1 = np.searchsorted(query_N, np.arange(len(leave_T) + 1))
    blocks: list[Block] = []
    prefixes: list[Prefix] = []
    pending = [(start, stop, np.zeros(0, dtype=np.int64)) for start, stop in _siblings(leave_T, 0, len(leave_T))]
    while pending:
        start, stop, above = pending.pop()
        end = int(stop_T[start])
        query_Q = query_N[first_T1[start] : first_T1[stop]]
        if end < stop and (stop - start) * len(query_Q) <= limit**2:
            blocks.append(Block(queries=query_Q, keys=np.concatenate([above, np.arange(start, stop)])))
            continue
        blocks += _run(above, start, end, query_N[first_T1[start] : first_T1[end]])
        path = np.concatenate([above, np.arange(start, end)])
        first, last = int(first_T1[end]), int(first_T1[stop])
        if min(len(path), last - first) >= shared:
            prefixes.append(Prefix(keys=path, first=first, last=last))
            path = path[:0]
        pending += [(first, last, path) for first, last in _packed(_siblings(leave_T, end, stop), first_T1, limit)]
    return blocks, prefixes


def _run(above: IntArray, start: int, end: int, query_Q: IntArray) -> Iterator[Block]:
    """The blocks of an unbranched run of tokens, below some others."""
    if not len(above) and len(query_Q) == end - start:
        yield Block(queries=query_Q, keys=query_Q, causal=True)
        return
    path = np.concatenate([above, np.arange(start, end)])
    for first in range(0, len(query_Q), CHAIN):
        queries = query_Q[first : first + CHAIN]
        yield Block(queries=queries, keys=path[: len(above) + int(queries[-1]) + 1 - start])


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


def padded(blocks: Sequence[Block], leave_T: IntArray) -> Batch:
    """A group of `batched` as one call."""
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
