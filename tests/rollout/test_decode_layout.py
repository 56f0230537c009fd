"""Attention of decode batches whose rows come and go, against one softmax over each row's own keys."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mas_hpc.rollout.native import tails
from mas_hpc.rollout.native.decode_attention import DecodeAttention
from mas_hpc.rollout.native.decode_layout import LENGTH_SLACK_TOKENS, WORTH_SHARING, lay_out
from mas_hpc.rollout.native.kv_pool import KVPool, KVShape
from mas_hpc.rollout.native.kv_tree import KVTree, Node, path_keys

LAYERS, HEADS, QUERIES, DIM = 2, 2, 3, 4
SHAPE = KVShape(layers=LAYERS, heads=HEADS, dim=DIM, dtype=torch.float64, device=torch.device("cpu"))


@dataclass(eq=False)
class Row:
    context: Node
    decoded: list[Tensor] = field(default_factory=list)
    """Of each token keys and values, [L, 2, K, D]."""


class Batch:
    """A decode batch beside the plain record of what its rows have decoded."""

    def __init__(self) -> None:
        self.tree, self.pool = KVTree(20_000), KVPool(SHAPE, 20_000)
        self.pool.reach(torch.tensor([19_999]))
        self.pool.kv_L2KPD.normal_()
        self.rows: list[Row] = []
        self.attend: DecodeAttention | None = None

    def context(self, *token_ids: int) -> Node:
        leaf = self.tree.insert(path_keys(token_ids, [-1] * len(token_ids)))
        self.tree.pin(leaf)
        return leaf

    def lay(self, rows: Sequence[Row], spare: int = 3) -> list[int]:
        places = [self.rows.index(row) if row in self.rows else None for row in rows]
        self.attend, order = lay_out([row.context for row in rows], places, self.pool, self.attend, spare=spare)
        assert sorted(order) == list(range(len(rows)))
        self.rows = [rows[number] for number in order]
        return order

    def step(self) -> None:
        """Decode a token of each row, and compare."""
        assert self.attend is not None
        new_L2KBD = torch.randn(LAYERS, 2, HEADS, len(self.rows), DIM, dtype=torch.float64)
        self.attend.advance()
        for row, new in zip(self.rows, new_L2KBD.unbind(3), strict=True):
            row.decoded.append(new)
        for layer in range(LAYERS):
            query_HBD = torch.randn(HEADS * QUERIES, len(self.rows), DIM, dtype=torch.float64)
            found_BHD = self.attend(layer, query_HBD, new_L2KBD[layer, 0], new_L2KBD[layer, 1], 0.5)
            for number, row in enumerate(self.rows):
                torch.testing.assert_close(found_BHD[number], self.plain(row, layer, query_HBD[:, number]), atol=1e-12, rtol=0)
        real, _ = self.attend.keys()
        assert real == sum(row.context.end + len(row.decoded) for row in self.rows)

    def plain(self, row: Row, layer: int, query_HD: Tensor) -> Tensor:
        context = self.pool.kv_L2KPD[layer][:, :, torch.from_numpy(row.context.slots())]
        key_KTD, value_KTD = torch.cat([context, torch.stack([new[layer] for new in row.decoded], 2)], 2)
        query_KQD = query_HD.unflatten(0, (HEADS, QUERIES))
        return ((query_KQD @ key_KTD.mT * 0.5).softmax(-1) @ value_KTD).flatten(0, 1)


@pytest.fixture(params=[True, False], ids=["turned keys", "keys as on accelerators"])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Batch:
    torch.manual_seed(0)
    monkeypatch.setattr(tails, "keys_are_turned", lambda device: request.param)
    return Batch()


@pytest.mark.parametrize("seed", range(10))
def test_rows_that_come_and_go_attend_to_their_own_keys(batch: Batch, seed: int) -> None:
    draw = random.Random(seed)
    stem = [draw.randrange(1, 9) for _ in range(draw.choice([1, 20, WORTH_SHARING]))]
    sizes = draw.choice([(1, 5), (20, 60), (64, 128)])
    contexts = [
        batch.context(*stem, *(draw.randrange(1, 9) for _ in range(draw.randint(*sizes)))) for _ in range(draw.choice([3, 12]))
    ]
    live: list[Row] = []
    for _ in range(14):
        live = [row for row in batch.rows if draw.random() < 0.75]
        live += [Row(draw.choice(contexts)) for _ in range(draw.randint(0 if live else 1, 4))]
        draw.shuffle(live)
        batch.lay(live, spare=draw.randint(1, 6))
        for _ in range(draw.choice([1, 1, 5, 40])):
            batch.step()


def singles(batch: Batch, *lengths: int) -> list[Row]:
    return [Row(batch.context(*[number + 1] * length)) for number, length in enumerate(lengths)]


def test_long_contexts_are_not_copied_again_when_rows_leave_and_others_come(batch: Batch) -> None:
    rows = singles(batch, 90, 100, 95, 100)
    batch.lay(rows)
    batch.step()
    (before,) = batch.attend.buckets
    buffers = [key.data_ptr() for key in before.tails._key_LBKCD]
    batch.lay([rows[0], rows[2], rows[3], Row(batch.context(*[7] * 92))])
    batch.step()
    (after,) = batch.attend.buckets
    assert after.tails is before.tails
    assert [key.data_ptr() for key in after.tails._key_LBKCD] == buffers


def test_rows_without_a_home_get_buffers_of_their_own(batch: Batch) -> None:
    rows = singles(batch, 100, 100)
    batch.lay(rows)
    batch.step()
    (before,) = batch.attend.buckets
    longer = Row(batch.context(*[8] * (101 + LENGTH_SLACK_TOKENS)))
    batch.lay([*rows, longer])  # No memory for a third row, nor for its columns.
    batch.step()
    assert before.tails is not batch.attend.buckets[0].tails
    (joined,) = batch.attend.buckets
    batch.lay([longer])
    assert batch.attend.buckets[0].tails is not joined.tails  # Three times the memory that one row needs is given back.
    batch.step()


def test_memory_of_rows_that_have_left_is_given_back_when_it_is_more_than_a_third_of_what_is_used(batch: Batch) -> None:
    rows = singles(batch, 90, 90, 90, 90)
    batch.lay(rows)
    batch.step()
    whole = batch.attend.num_bytes
    batch.lay(rows[:3])
    batch.step()
    assert batch.attend.num_bytes == whole
    batch.lay(rows[:2])
    batch.step()
    assert batch.attend.num_bytes < 0.6 * whole


def test_rows_of_one_context_read_one_copy_of_it_however_many_are_left(batch: Batch) -> None:
    context = batch.context(*range(1, 101))
    rows = [Row(context) for _ in range(3)]
    batch.lay(rows)
    batch.step()
    (before,) = batch.attend.buckets
    assert before.shared.num_bytes == 100 * SHAPE.token_bytes and not before.is_joined
    batch.lay(rows[:2])
    batch.step()
    assert batch.attend.buckets[0].shared is before.shared
    batch.lay(rows[:1])
    batch.step()
    assert batch.attend.buckets[0].is_joined


def test_what_contexts_share_is_read_once_for_all(batch: Batch) -> None:
    stem = [9] * WORTH_SHARING
    batch.lay([Row(batch.context(*stem, *[number] * 5)) for number in (1, 2, 3)])
    batch.step()
    (bucket,) = batch.attend.buckets
    assert bucket.shared.num_bytes == WORTH_SHARING * SHAPE.token_bytes
    stranger = Row(batch.context(*[8] * WORTH_SHARING, *[4] * 5))
    batch.lay([*batch.rows[1:], stranger])  # It fits by its length, but does not begin like the others.
    batch.step()


def test_padding_is_what_is_read_but_hidden(batch: Batch) -> None:
    rows = singles(batch, 100, 90)
    batch.lay(rows)
    batch.step()
    assert batch.attend.keys() == (192, 10)
    batch.lay([rows[1]])
    batch.step()
    assert batch.attend.keys() == (92, 0)


def test_decoded_tokens_go_to_their_slots(batch: Batch) -> None:
    rows = singles(batch, 70, 70)
    pair = batch.context(3, 3, 3)
    batch.lay([*rows, Row(pair), Row(pair)])
    for _ in range(4):
        batch.step()
    tokens = [(row, number, 15_000 + 10 * row + number) for row in range(4) for number in (1, 3)]
    batch.attend.store(tokens, batch.pool)
    for row, number, slot in tokens:
        assert torch.equal(batch.pool.kv_L2KPD[:, :, :, slot], batch.rows[row].decoded[number])
    assert [batch.attend.num_decoded(row) for row in range(4)] == [4] * 4
