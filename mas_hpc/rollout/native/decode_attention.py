"""Attention of decoding: each row along its own context and along what it has decoded since.

Rows of one context are neighbours. Contexts with equally many rows and similar lengths are one Bucket: what all of them
begin with is attended to once for all rows, the rest once a context, without a copy per row.
Legend: L layers, 2 key and value, K key/value heads, Q query heads per K, H = K Q, G contexts of a bucket, S tokens that
all of them begin with, C longest rest, B rows, R rows of a bucket, W decoded columns, D head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mas_hpc.rollout.native.kv_pool import KVPool
from mas_hpc.rollout.native.kv_tree import Node

LENGTH_SLACK = 0.25
"""Longest context of a bucket relative to its shortest: bounds padding."""
LENGTH_SLACK_TOKENS = 16
CAPACITY_STEP = 32
"""Columns that tails have to spare at most, and grow by when they are full: a copy every so many steps."""
WORTH_SHARING = 256
"""Keys, over all contexts of a bucket, that must be saved before what they share gets a matrix product of its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Rows start..stop: contexts (their last nodes), each with equally many rows, in order."""

    contexts: tuple[Node, ...]
    start: int
    stop: int
    shared_L2KSD: Tensor | None
    """What all contexts begin with; None when that is little."""
    own_L2KGCD: Tensor
    bias_G1C: Tensor | None
    """Hides padding; None when the contexts are equally long."""
    padding: int
    """Padded keys, over all rows."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies."""
        return self.own_L2KGCD.nbytes + (0 if self.shared_L2KSD is None else self.shared_L2KSD.nbytes)


class Tails:
    """What the rows have decoded: all write one column at a time, so a row admitted later starts at a later column."""

    def __init__(self, kv_L2KBWD: Tensor, start_B: Sequence[int], width: int) -> None:
        self.width = width
        self.start_B = list(start_B)
        self.kv_L2KBWD = kv_L2KBWD
        self._bias_B1W = self._bias()

    def keep(self, rows: Sequence[int | None], spare: int) -> Tails:
        """The tails of these rows of mine in this order, with room for `spare` columns; None is an empty tail."""
        kept = [row for row in rows if row is not None]
        first = min((self.start_B[row] for row in kept), default=self.width)
        width = self.width - first
        shape = list(self.kv_L2KBWD.shape)
        shape[3:5] = len(rows), width + spare
        tails = self.kv_L2KBWD.new_empty(shape)
        if width:
            place, empty = ([i for i, row in enumerate(rows) if (row is None) == fresh] for fresh in (False, True))
            tails[:, :, :, place, :width] = self.kv_L2KBWD[..., first : self.width, :][:, :, :, kept]
            tails[:, :, :, empty, :width] = 0  # Hidden, but a weight of 0 does not hide nan.
        return Tails(tails, [width if row is None else self.start_B[row] - first for row in rows], width)

    def advance(self) -> None:
        """Open a column, to which each layer then writes."""
        if self.width == self.kv_L2KBWD.shape[4]:
            grown = self.keep(range(len(self.start_B)), spare=CAPACITY_STEP)
            self.width, self.start_B = grown.width, grown.start_B
            self.kv_L2KBWD, self._bias_B1W = grown.kv_L2KBWD, grown._bias_B1W
        self.width += 1

    def write(self, layer: int, key_KBD: Tensor, value_KBD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fill the open column; return the layer's keys, values and the bias that hides columns before a row's."""
        key_KBWD, value_KBWD = self.kv_L2KBWD[layer, :, :, :, : self.width]
        key_KBWD[:, :, -1] = key_KBD
        value_KBWD[:, :, -1] = value_KBD
        return key_KBWD, value_KBWD, None if self._bias_B1W is None else self._bias_B1W[..., : self.width]

    def columns(self, row: int) -> range:
        """Where the row's tokens lie."""
        return range(self.start_B[row], self.width)

    def _bias(self) -> Tensor | None:
        if not any(self.start_B):
            return None
        column_W = torch.arange(self.kv_L2KBWD.shape[4], device=self.kv_L2KBWD.device)
        hidden_B1W = column_W < torch.tensor(self.start_B, device=column_W.device)[:, None, None]
        return self.kv_L2KBWD.new_zeros(hidden_B1W.shape).masked_fill_(hidden_B1W, -torch.inf)


class DecodeAttention:
    """An `Attend` for one token a row (T = B): along the row's context and its own tail, as one softmax."""

    def __init__(self, buckets: Sequence[Bucket], tails: Tails) -> None:
        self.buckets = tuple(buckets)
        self.tails = tails

    @property
    def num_bytes(self) -> int:
        """Bytes of tails and of copied contexts."""
        return self.tails.kv_L2KBWD.nbytes + sum(bucket.num_bytes for bucket in self.buckets)

    def keys(self) -> tuple[int, int]:
        """How many keys the rows attend to together, and how many of these only pad."""
        hidden = sum(self.tails.start_B)
        padding = hidden + sum(bucket.padding for bucket in self.buckets)
        contexts = sum(
            context.end * (bucket.stop - bucket.start) // len(bucket.contexts)
            for bucket in self.buckets
            for context in bucket.contexts
        )
        return contexts + self.tails.width * len(self.tails.start_B) - hidden, padding

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
    key_KGCD, value_KGCD = bucket.own_L2KGCD[layer]
    num_heads, num_contexts, length, dim = key_KGCD.shape
    rows = query_KRQD.shape[:3]
    scores = query_KRQD.reshape(num_heads, num_contexts, -1, dim) @ key_KGCD.mT
    if bucket.bias_G1C is not None:
        scores += bucket.bias_G1C
    parts = [scores.view(*rows, length), tail_scores_KRQW]
    if bucket.shared_L2KSD is not None:
        shared_key_KSD, shared_value_KSD = bucket.shared_L2KSD[layer]
        parts.append((query_KRQD.flatten(1, 2) @ shared_key_KSD.mT).view(*rows, -1))
    weight = torch.cat(parts, -1).softmax(-1, dtype=torch.promote_types(query_KRQD.dtype, torch.float32)).to(query_KRQD.dtype)
    own, tail, *shared = weight.split([part.shape[-1] for part in parts], -1)
    attended = (own.reshape(scores.shape) @ value_KGCD).view(*rows, dim)
    if shared:
        attended += (shared[0].flatten(1, 2) @ shared_value_KSD).view(*rows, dim)
    return attended, tail


def row_order(contexts: Sequence[Node]) -> list[int]:
    """Order rows (given by their contexts) so that those of one context, and contexts of one bucket, are neighbours."""
    count = Counter(contexts)
    number = {context: i for i, context in enumerate(count)}
    return sorted(range(len(contexts)), key=lambda i: (count[contexts[i]], contexts[i].end, number[contexts[i]]))


def buckets(contexts: Sequence[Node], pool: KVPool, previous: Sequence[Bucket] = ()) -> list[Bucket]:
    """Buckets of rows in `row_order`; what a previous bucket of the same contexts copied is used again."""
    groups: list[list[Node]] = []
    count = Counter(contexts)
    for context in count:
        first = groups[-1][0] if groups else context
        limit = first.end * (1 + LENGTH_SLACK) + LENGTH_SLACK_TOKENS
        if groups and count[first] == count[context] and context.end <= limit:
            groups[-1].append(context)
        else:
            groups.append([context])
    known = {bucket.contexts: bucket for bucket in previous}
    result, start = [], 0
    for group in groups:
        members, each = tuple(group), count[group[0]]
        stop = start + len(group) * each
        shared, own, bias = _copies(members, pool, known.get(members))
        lengths = [context.end for context in members]
        padding = each * sum(max(lengths) - length for length in lengths)
        result.append(
            Bucket(
                contexts=members, start=start, stop=stop, shared_L2KSD=shared, own_L2KGCD=own, bias_G1C=bias, padding=padding
            )
        )  # fmt: skip
        start = stop
    return result


def _copies(contexts: Sequence[Node], pool: KVPool, known: Bucket | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What the contexts share, the rest of each, and the bias that hides its padding."""
    if known is not None:
        return known.shared_L2KSD, known.own_L2KGCD, known.bias_G1C
    slots = [context.slots() for context in contexts]
    common = _common_tokens(contexts) if len(contexts) > 1 else 0
    common = common if common * (len(contexts) - 1) >= WORTH_SHARING else 0
    lengths = [len(slot_T) - common for slot_T in slots]
    slot_GC = np.zeros((len(slots), max(lengths)), dtype=np.int64)
    for row, slot_T in enumerate(slots):
        slot_GC[row, : lengths[row]] = slot_T[common:]
        slot_GC[row, lengths[row] :] = slot_T[-1]  # Hidden, but it must be finite.
    device = pool.shape.device
    shared = pool.copy(torch.from_numpy(slots[0][:common]).to(device)) if common else None
    own = pool.copy(torch.from_numpy(slot_GC.ravel()).to(device)).unflatten(3, slot_GC.shape)
    if min(lengths) == max(lengths):
        return shared, own, None
    hidden_GC = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    bias_G1C = torch.zeros(hidden_GC.shape, dtype=own.dtype).masked_fill_(hidden_GC, -torch.inf)[:, None]
    return shared, own, bias_G1C.to(device)


def _common_tokens(contexts: Sequence[Node]) -> int:
    """Tokens that all contexts begin with; at least one of each is left."""
    paths = [context.path() for context in contexts]
    common = 0
    for nodes in zip(*paths, strict=False):
        if any(node is not nodes[0] for node in nodes):
            break
        common = nodes[0].end
    return min(common, min(context.end for context in contexts) - 1)
