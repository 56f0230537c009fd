"""Attention of decoding: each row along its own context and along what it has decoded since.

Rows of one context are neighbours. Contexts with equally many rows and similar lengths are one Bucket: what all of them
begin with is attended to once for all rows, the rest once a context, without a copy per row. Where each context has one
row, the rest lies in one buffer with what that row has decoded.
Legend: L layers, 2 key and value, K key/value heads, Q query heads per K, H = K Q, G contexts of a bucket, E rows of each,
R = G E, S tokens that all contexts begin with, C longest rest, B rows, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_hpc.prefix_tree import IntArray
from mas_hpc.rollout.native.kv_pool import KVPool
from mas_hpc.rollout.native.kv_tree import Node
from mas_hpc.rollout.native.tails import Tails


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shared:
    """Copies of keys and values that several rows read."""

    start_L2KSD: Tensor | None
    """What all contexts begin with; None when that is little."""
    rest_L2NCD: Tensor | None
    """The rest of each context, N = G K; None when each has one row, whose tail it then belongs to."""
    bias_N1C: Tensor | None
    """Hides padding; None when the contexts are equally long."""
    padding: int
    """Padded keys, over all rows."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(part.nbytes for part in (self.start_L2KSD, self.rest_L2NCD) if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Rows start..stop: contexts (their last nodes), each with equally many rows, in order."""

    contexts: tuple[Node, ...]
    start: int
    stop: int
    common_S: IntArray
    """Slots of what all contexts begin with, as far as it has a product of its own."""
    shared: Shared
    tails: Tails

    @property
    def is_joined(self) -> bool:
        """Contexts lie in the tails."""
        return self.shared.rest_L2NCD is None

    @property
    def num_keys(self) -> int:
        """How many keys the rows attend to together."""
        each = (self.stop - self.start) // len(self.contexts)
        decoded = sum(self.tails.num_decoded(row) for row in range(self.tails.num_rows))
        return each * sum(context.end for context in self.contexts) + decoded

    def attend(self, layer: int, query_RKQD: Tensor, scaling: float) -> Tensor:
        """The softmax over contexts and tails, applied to the values, [R, K, Q, D]."""
        rows, heads = query_RKQD.shape[:2]
        scores_NQW = self.tails.scores(layer, query_RKQD.flatten(0, 1), scaling)
        shared = self.shared
        if shared.rest_L2NCD is None and shared.start_L2KSD is None:
            return self.tails.weigh(layer, _softmax(scores_NQW)).unflatten(0, (rows, heads))
        query_GEKQD = query_RKQD.unflatten(0, (len(self.contexts), -1))
        parts = [scores_NQW.view(*query_GEKQD.shape[:4], -1)]
        if shared.rest_L2NCD is not None:
            scores = _each_context(query_GEKQD) @ shared.rest_L2NCD[layer, 0].mT * scaling
            parts.append(_from_contexts(scores if shared.bias_N1C is None else scores.add_(shared.bias_N1C), query_GEKQD))
        if shared.start_L2KSD is not None:
            scores = _all_contexts(query_GEKQD) @ shared.start_L2KSD[layer, 0].mT * scaling
            parts.append(_from_all(scores, query_GEKQD))
        tail, *others = _softmax(torch.cat(parts, -1)).split([part.shape[-1] for part in parts], -1)
        attended = self.tails.weigh(layer, tail.reshape(scores_NQW.shape)).reshape(query_GEKQD.shape)
        if shared.rest_L2NCD is not None:
            attended += _from_contexts(_each_context(others[0]) @ shared.rest_L2NCD[layer, 1], query_GEKQD)
        if shared.start_L2KSD is not None:
            attended += _from_all(_all_contexts(others[-1]) @ shared.start_L2KSD[layer, 1], query_GEKQD)
        return attended.flatten(0, 1)


class DecodeAttention:
    """An `Attend` for one token a row (T = B): along the row's context and its own tail, as one softmax."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self._tails = [(bucket.tails, row) for bucket in self.buckets for row in range(bucket.tails.num_rows)]

    @property
    def num_bytes(self) -> int:
        """Bytes of tails and of copied contexts."""
        return sum(bucket.tails.num_bytes + bucket.shared.num_bytes for bucket in self.buckets)

    def keys(self) -> tuple[int, int]:
        """How many keys the rows attend to together, and how many of these only pad."""
        padding = sum(bucket.tails.padding + bucket.shared.padding for bucket in self.buckets)
        return sum(bucket.num_keys for bucket in self.buckets), padding

    def num_decoded(self, row: int) -> int:
        """How many keys the row has that came since its context."""
        tails, place = self._tails[row]
        return tails.num_decoded(place)

    def store(self, tokens: Sequence[tuple[int, int, int]], pool: KVPool) -> None:
        """Copy decoded tokens into the pool, each given by its row, its number since the row's context, and its slot."""
        pool.reach(torch.tensor([slot for _, _, slot in tokens]))
        for bucket in self.buckets:
            found = [(row - bucket.start, number, slot) for row, number, slot in tokens if bucket.start <= row < bucket.stop]
            if found:
                slot_T = torch.tensor([slot for _, _, slot in found], device=pool.shape.device)
                pool.kv_L2KPD[:, :, :, slot_T] = bucket.tails.tokens([(row, number) for row, number, _ in found])

    def advance(self) -> None:
        """Open a column in all tails, to which each layer then writes."""
        for bucket in self.buckets:
            bucket.tails.advance()

    def __call__(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [B, H, D]."""
        # The query heads that share a key/value head are query positions of it: nothing is repeated.
        query_BKQD = query_HTD.transpose(0, 1).unflatten(1, (len(key_KTD), -1))
        key_BKD, value_BKD = key_KTD.transpose(0, 1), value_KTD.transpose(0, 1)
        if len(self.buckets) == 1:
            self.buckets[0].tails.write(layer, key_BKD, value_BKD)
            return self.buckets[0].attend(layer, query_BKQD, scaling).flatten(1, 2)
        parts = []
        for bucket in self.buckets:
            rows = slice(bucket.start, bucket.stop)
            bucket.tails.write(layer, key_BKD[rows], value_BKD[rows])
            parts.append(bucket.attend(layer, query_BKQD[rows], scaling))
        return torch.cat(parts).flatten(1, 2)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _each_context(x_GEKQD: Tensor) -> Tensor:
    """Rows of one context as queries of it, [G K, E Q, D]."""
    return x_GEKQD.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _from_contexts(x: Tensor, like_GEKQD: Tensor) -> Tensor:
    """The inverse of `_each_context`, for any last dimension."""
    contexts, each, heads, queries, _ = like_GEKQD.shape
    return x.view(contexts, heads, each, queries, -1).transpose(1, 2)


def _all_contexts(x_GEKQD: Tensor) -> Tensor:
    """All rows as queries of what all contexts share, [K, R Q, D]."""
    return x_GEKQD.permute(2, 0, 1, 3, 4).flatten(1, 3)


def _from_all(x: Tensor, like_GEKQD: Tensor) -> Tensor:
    """The inverse of `_all_contexts`, for any last dimension."""
    contexts, each, heads, queries, _ = like_GEKQD.shape
    return x.view(heads, contexts, each, queries, -1).permute(1, 2, 0, 3, 4)
