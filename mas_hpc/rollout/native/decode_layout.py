"""Which rows of a decode batch are one bucket, and what of the previous layout's buffers serves again.

A bucket whose contexts have one row each keeps its buffers while rows leave and others take their memory: long contexts
are copied once. Legend: G contexts of a bucket, C longest rest, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mas_hpc.prefix_tree import IntArray
from mas_hpc.rollout.native.decode_attention import Bucket, DecodeAttention, Shared
from mas_hpc.rollout.native.kv_pool import KVPool
from mas_hpc.rollout.native.kv_tree import Node
from mas_hpc.rollout.native.tails import Source, Tails

LENGTH_SLACK = 0.25
"""Longest row of a bucket relative to its shortest: bounds padding."""
LENGTH_SLACK_TOKENS = 16
WORTH_SHARING = 256
"""Keys, over all contexts of a bucket, that must be saved before what they share gets a matrix product of its own."""
SPARSE = 4 / 3
"""Buffers with room for more than so many times their rows are given back: the scheduler does not count what is free."""
NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """A row that is to be laid out."""

    number: int
    context: Node
    bucket: Bucket | None = None
    """Where it lay, and which of the bucket's rows it was."""
    row: int = 0

    @property
    def num_decoded(self) -> int:
        """Keys since its context."""
        return self.bucket.tails.num_decoded(self.row) if self.bucket else 0

    def __len__(self) -> int:
        return self.context.end + self.num_decoded


def lay_out(
    contexts: Sequence[Node], places: Sequence[int | None], pool: KVPool, previous: DecodeAttention | None, *, spare: int
) -> tuple[DecodeAttention, list[int]]:
    """Attention of rows, given by contexts and by places in a previous batch (None: fresh), with room for `spare` tokens.

    Returns it and the order in which it has the rows. The previous one is of no use any more.
    """
    by_row = [(bucket, row) for bucket in previous.buckets for row in range(bucket.tails.num_rows)] if previous else []
    rows = [
        Place(number=number, context=context)
        if place is None
        else Place(number=number, context=context, bucket=by_row[place][0], row=by_row[place][1])
        for number, (context, place) in enumerate(zip(contexts, places, strict=True))
    ]
    groups = _groups(rows)
    known = {bucket.contexts: bucket for bucket in previous.buckets} if previous else {}
    buckets: list[Bucket] = []
    order: list[Place] = []
    for group in groups:
        home = _home(group, rows)
        if home is not None:
            bucket, group = _stay(group, home, pool, len(order))
        else:
            bucket = _make(group, pool, known, len(order), spare)
        buckets.append(bucket)
        order += group
    return DecodeAttention(buckets), [place.number for place in order]


def _groups(rows: Sequence[Place]) -> list[list[Place]]:
    """Rows of one bucket, those of one context next to each other."""
    count = Counter(place.context for place in rows)
    number = {context: i for i, context in enumerate(count)}

    def size(place: Place) -> int:
        return len(place) if count[place.context] == 1 else place.context.end

    groups: list[list[Place]] = []
    for place in sorted(rows, key=lambda place: (count[place.context], size(place), number[place.context])):
        first = groups[-1][0] if groups else place
        limit = size(first) * (1 + LENGTH_SLACK) + LENGTH_SLACK_TOKENS
        if groups and count[first.context] == count[place.context] and size(place) <= limit:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _home(group: Sequence[Place], rows: Sequence[Place]) -> Bucket | None:
    """The previous bucket whose buffers the group's rows can stay in, or take a free place of; None when there is none.

    No other group has rows of that bucket, so nothing is copied from there after it has changed.
    """
    contexts = dict.fromkeys(place.context for place in group)
    homes = {place.bucket for place in group if place.bucket is not None}
    if len(homes) != 1 or len(contexts) < len(group):
        return None
    (home,) = homes
    old = [place for place in group if place.bucket is home]
    fits = (
        len(group) <= home.tails.capacity <= SPARSE * len(group)
        and max(map(len, group)) <= len(home.common_S) + home.tails.width
    )
    if not home.is_joined or not fits or len(old) < sum(place.bucket is home for place in rows):
        return None
    common = len(home.common_S)
    fresh = [place.context.slots()[:common] for place in group if place.bucket is None]
    if not all(len(slot_T) == common and np.array_equal(slot_T, home.common_S) for slot_T in fresh):
        return None
    is_enough = (_common_tokens(list(contexts)) - common) * (len(contexts) - 1) < WORTH_SHARING
    return home if is_enough and all(place.context.end > common for place in group) else None


def _stay(group: Sequence[Place], home: Bucket, pool: KVPool, start: int) -> tuple[Bucket, list[Place]]:
    old = {place.row: place for place in group if place.bucket is home}
    fresh = [place for place in group if place.bucket is None]
    gone = [row for row in range(home.tails.num_rows) if row not in old]
    sources = [Source(slot_T=place.context.slots()[len(home.common_S) :]) for place in fresh]
    kept = home.tails.replace(gone, sources, pool)
    order = [*(old[row] for row in kept), *fresh]
    bucket = Bucket(
        contexts=tuple(place.context for place in order), start=start, stop=start + len(order), common_S=home.common_S,
        shared=home.shared, tails=home.tails,
    )  # fmt: skip
    return bucket, order


def _make(group: Sequence[Place], pool: KVPool, known: dict[tuple[Node, ...], Bucket], start: int, spare: int) -> Bucket:
    contexts = tuple(dict.fromkeys(place.context for place in group))
    is_joined = len(contexts) == len(group)
    old = known.get(contexts)
    if old is not None and not is_joined and not old.is_joined:
        common_S, shared = old.common_S, old.shared
    else:
        common = _common_tokens(contexts)
        common_S = contexts[0].slots()[:common] if common * (len(contexts) - 1) >= WORTH_SHARING else NOTHING
        shared = _copies(contexts, common_S, len(group) // len(contexts), pool)
    sources = [_source(place, common_S, is_joined=is_joined) for place in group]
    return Bucket(
        contexts=contexts, start=start, stop=start + len(group), common_S=common_S, shared=shared,
        tails=Tails(sources, pool, spare=spare),
    )  # fmt: skip


def _source(place: Place, common_S: IntArray, *, is_joined: bool) -> Source:
    """Where a row's tail comes from: all of it from where it lay, if that began where it does now."""
    bucket, decoded = place.bucket, place.num_decoded
    tails = bucket.tails if bucket else None
    if not is_joined:
        return Source(slot_T=NOTHING, tails=tails, row=place.row, count=decoded, num_decoded=decoded)
    if bucket and bucket.is_joined and len(bucket.common_S) == len(common_S):
        count = bucket.tails.length(place.row)
        return Source(slot_T=NOTHING, tails=tails, row=place.row, count=count, num_decoded=decoded)
    own_T = place.context.slots()[len(common_S) :]
    return Source(slot_T=own_T, tails=tails, row=place.row, count=decoded, num_decoded=decoded)


def _copies(contexts: Sequence[Node], common_S: IntArray, each: int, pool: KVPool) -> Shared:
    """What the contexts share and, if each has several rows, the rest of each and the bias that hides its padding."""
    device, common = pool.shape.device, len(common_S)
    start = pool.copy(torch.from_numpy(common_S).to(device)) if common else None
    if each == 1:
        return Shared(start_L2KSD=start, rest_L2NCD=None, bias_N1C=None, padding=0)
    slots = [context.slots()[common:] for context in contexts]
    lengths = [len(slot_C) for slot_C in slots]
    longest = max(lengths)
    # What is hidden must be finite: a weight of 0 does not hide nan.
    slot_GC = np.stack([np.pad(slot_C, (0, longest - len(slot_C)), mode="edge") for slot_C in slots])
    rest = pool.copy(torch.from_numpy(slot_GC.ravel()).to(device)).unflatten(3, slot_GC.shape)
    return Shared(
        start_L2KSD=start, rest_L2NCD=rest.transpose(2, 3).flatten(2, 3), bias_N1C=_bias(lengths, pool),
        padding=each * sum(longest - length for length in lengths),
    )  # fmt: skip


def _bias(lengths: Sequence[int], pool: KVPool) -> Tensor | None:
    if min(lengths) == max(lengths):
        return None
    hidden_GC = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    bias_GC = torch.zeros(hidden_GC.shape, dtype=pool.shape.dtype).masked_fill_(hidden_GC, -torch.inf)
    return bias_GC.repeat_interleave(pool.shape.heads, 0)[:, None].to(pool.shape.device)


def _common_tokens(contexts: Sequence[Node]) -> int:
    """Tokens that all contexts begin with; at least one of each is left."""
    paths = [context.path() for context in contexts]
    common = 0
    for nodes in zip(*paths, strict=False):
        if any(node is not nodes[0] for node in nodes):
            break
        common = nodes[0].end
    return min(common, min(context.end for context in contexts) - 1)
