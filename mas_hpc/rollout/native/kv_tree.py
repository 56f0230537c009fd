"""Keys and values of live rows: prompts as paths in shared trees, and what each row has decoded since.

A prompt is stored once however many rows continue it (a Context). Rows are sorted so that those of one context are
neighbours; contexts with equally many rows are one Bucket, computed without a copy per row.
Legend: L layers, 2 key and value, K key/value heads, Q query heads per K, H = K Q, T tree tokens, G contexts of a
bucket, C context tokens, B rows, R rows of a bucket, W decoded columns, D head dimension, E hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_SLACK = 0.25
"""Longest context of a bucket relative to its shortest: bounds padding."""
LENGTH_SLACK_TOKENS = 16
CAPACITY_STEP = 32
"""Columns that tails have to spare, at most, and grow by when they are full, at least."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """The K/V of one prompt: a path in the tree of the prompts that were prefilled together. Equal only to itself."""

    tree_L2KTD: Tensor
    path_C: Tensor
    hidden_E: Tensor
    """Last hidden state of the prompt: it predicts the first token of every completion."""

    def __len__(self) -> int:
        return len(self.path_C)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Rows start..stop: contexts of similar length, each with equally many rows, in order."""

    contexts: tuple[Context, ...]
    start: int
    stop: int
    kv_L2KGCD: Tensor
    bias_G1C: Tensor | None
    """Hides padding; None when all contexts are equally long."""


class Tails:
    """What the rows have decoded: all write one column at a time, so a row admitted later starts at a later column."""

    def __init__(self, kv_L2KBWD: Tensor, start_B: Sequence[int], width: int) -> None:
        self.width = width
        self.start_B = list(start_B)
        self._kv_L2KBWD = kv_L2KBWD
        self._bias_B1W = self._bias()

    def keep(self, rows: Sequence[int | None], spare: int) -> Tails:
        """The tails of these rows of mine in this order, with room for `spare` columns; None is an empty tail."""
        kept = [row for row in rows if row is not None]
        first = min((self.start_B[row] for row in kept), default=self.width)
        width = self.width - first
        shape = list(self._kv_L2KBWD.shape)
        shape[3:5] = len(rows), width + spare
        tails = self._kv_L2KBWD.new_empty(shape)
        if width:
            place, empty = ([i for i, row in enumerate(rows) if (row is None) == fresh] for fresh in (False, True))
            tails[:, :, :, place, :width] = self._kv_L2KBWD[..., first : self.width, :][:, :, :, kept]
            tails[:, :, :, empty, :width] = 0  # Hidden, but a weight of 0 does not hide nan.
        return Tails(tails, [width if row is None else self.start_B[row] - first for row in rows], width)

    def advance(self) -> None:
        """Open a column, to which each layer then writes."""
        if self.width == self._kv_L2KBWD.shape[4]:
            grown = self.keep(range(len(self.start_B)), spare=max(CAPACITY_STEP, self.width))
            self.width, self.start_B = grown.width, grown.start_B
            self._kv_L2KBWD, self._bias_B1W = grown._kv_L2KBWD, grown._bias_B1W
        self.width += 1

    def write(self, layer: int, key_KBD: Tensor, value_KBD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fill the open column; return the layer's keys, values and the bias that hides columns before a row's."""
        key_KBWD, value_KBWD = self._kv_L2KBWD[layer, :, :, :, : self.width]
        key_KBWD[:, :, -1] = key_KBD
        value_KBWD[:, :, -1] = value_KBD
        return key_KBWD, value_KBWD, None if self._bias_B1W is None else self._bias_B1W[..., : self.width]

    def _bias(self) -> Tensor | None:
        if not any(self.start_B):
            return None
        column_W = torch.arange(self._kv_L2KBWD.shape[4], device=self._kv_L2KBWD.device)
        hidden_B1W = column_W < torch.tensor(self.start_B, device=column_W.device)[:, None, None]
        return self._kv_L2KBWD.new_zeros(hidden_B1W.shape).masked_fill_(hidden_B1W, -torch.inf)


class DecodeAttention:
    """An `Attend` for one token a row (T = B): along the row's context and its own tail, as one softmax."""

    def __init__(self, buckets: Sequence[Bucket], tails: Tails) -> None:
        self.buckets = tuple(buckets)
        self.tails = tails

    def __call__(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [B, H, D]."""
        key_KBWD, value_KBWD, bias_B1W = self.tails.write(layer, key_KTD, value_KTD)
        # The query heads that share a key/value head are query positions of it: nothing is repeated.
        query_KBQD = (query_HTD * scaling).unflatten(0, (len(key_KTD), -1)).transpose(1, 2).contiguous()
        scores_KBQW = query_KBQD @ key_KBWD.mT
        if bias_B1W is not None:
            scores_KBQW += bias_B1W
        parts = [
            _attend_context(b, layer, query_KBQD[:, b.start : b.stop], scores_KBQW[:, b.start : b.stop]) for b in self.buckets
        ]
        context_KBQD, weight_KBQW = parts[0] if len(parts) == 1 else (torch.cat(p, 1) for p in zip(*parts, strict=True))
        return (context_KBQD + weight_KBQW @ value_KBWD).transpose(0, 1).flatten(1, 2)


def _attend_context(bucket: Bucket, layer: int, query_KRQD: Tensor, tail_scores_KRQW: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over contexts and tails: the contexts' part applied to their values, and the weights of the tails."""
    key_KGCD, value_KGCD = bucket.kv_L2KGCD[layer]
    num_heads, num_contexts, length, dim = key_KGCD.shape
    rows = query_KRQD.shape[:3]
    scores = query_KRQD.reshape(num_heads, num_contexts, -1, dim) @ key_KGCD.mT
    if bucket.bias_G1C is not None:
        scores += bucket.bias_G1C
    weight = torch.cat([scores.view(*rows, length), tail_scores_KRQW], -1).softmax(-1)
    attended = weight[..., :length].reshape(scores.shape) @ value_KGCD
    return attended.view(*rows, dim), weight[..., length:]


def row_order(contexts: Sequence[Context]) -> list[int]:
    """Order rows (given by their contexts) so that those of one context, and contexts of one bucket, are neighbours."""
    count = Counter(contexts)
    number = {context: i for i, context in enumerate(count)}
    return sorted(range(len(contexts)), key=lambda i: (count[contexts[i]], len(contexts[i]), number[contexts[i]]))


def buckets(contexts: Sequence[Context], previous: Sequence[Bucket] = ()) -> list[Bucket]:
    """Buckets of rows in `row_order`; the K/V of a previous bucket with the same contexts is used again."""
    groups: list[list[Context]] = []
    count = Counter(contexts)
    for context in count:
        first = groups[-1][0] if groups else context
        limit = len(first) * (1 + LENGTH_SLACK) + LENGTH_SLACK_TOKENS
        if groups and count[first] == count[context] and len(context) <= limit:
            groups[-1].append(context)
        else:
            groups.append([context])
    known = {bucket.contexts: (bucket.kv_L2KGCD, bucket.bias_G1C) for bucket in previous}
    result, start = [], 0
    for group in groups:
        members = tuple(group)
        stop = start + len(group) * count[group[0]]
        kv, bias = known.get(members) or _gather(members)
        result.append(Bucket(contexts=members, start=start, stop=stop, kv_L2KGCD=kv, bias_G1C=bias))
        start = stop
    return result


def _gather(contexts: Sequence[Context]) -> tuple[Tensor, Tensor | None]:
    lengths = [len(context) for context in contexts]
    layers, two, heads, _, dim = contexts[0].tree_L2KTD.shape
    kv_L2KGCD = contexts[0].tree_L2KTD.new_zeros(layers, two, heads, len(contexts), max(lengths), dim)
    for i, context in enumerate(contexts):
        kv_L2KGCD[:, :, :, i, : lengths[i]] = context.tree_L2KTD.index_select(3, context.path_C)
    if min(lengths) == max(lengths):
        return kv_L2KGCD, None
    hidden_GC = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    bias_G1C = torch.zeros(hidden_GC.shape, dtype=kv_L2KGCD.dtype).masked_fill_(hidden_GC, -torch.inf)[:, None]
    return kv_L2KGCD, bias_G1C.to(kv_L2KGCD.device)
