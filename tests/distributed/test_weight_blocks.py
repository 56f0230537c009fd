"""The plan of the ring: every tensor has a place, and nothing lies where something unread still is."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from mas_hpc.distributed.weight_blocks import ALIGNMENT, plan
from mas_hpc.distributed.weight_source import HeldWeights, TensorSpec

DTYPES = ("float32", "bfloat16", "int64", "uint8")


@st.composite
def specs(draw: st.DrawFn) -> list[TensorSpec]:
    shapes = draw(st.lists(st.lists(st.integers(0, 30), max_size=2), max_size=30))
    return [
        TensorSpec(policy="base", name=str(index), dtype=draw(st.sampled_from(DTYPES)), shape=tuple(shape))
        for index, shape in enumerate(shapes)
    ]


@given(specs(), st.integers(64, 2000), st.integers(64, 4000))
def test_a_block_enters_where_nothing_unread_lies(tensors: list[TensorSpec], block_bytes: int, ahead_bytes: int) -> None:
    made = plan(tensors, block_bytes=block_bytes, ahead_bytes=ahead_bytes)
    for number, block in enumerate(made.blocks):
        assert block.start >= 0 and block.start + block.size <= made.ring_bytes
        assert block.needs <= number, "it would wait for itself"
        for other in made.blocks[block.needs : number]:
            assert other.start + other.size <= block.start or block.start + block.size <= other.start or not block.size


@given(specs(), st.integers(64, 2000))
def test_every_tensor_has_a_view_of_its_own_in_order(tensors: list[TensorSpec], block_bytes: int) -> None:
    made = plan(tensors, block_bytes=block_bytes, ahead_bytes=block_bytes)
    ring = torch.zeros(made.ring_bytes, dtype=torch.uint8)
    seen = []
    for block in made.blocks:
        assert block.size <= block_bytes or sum(spec.num_bytes > 0 for _, spec in block.tensors) == 1
        ring.zero_()
        for spec, view in block.views(ring):
            assert view.dtype == spec.torch_dtype and view.shape == spec.shape
            assert not view.numel() or (view.data_ptr() - ring.data_ptr()) % ALIGNMENT == 0
            view.view(-1).view(torch.uint8).add_(1)
            seen.append(spec)
        assert int(ring.max() if len(ring) else 0) <= 1, "two tensors share a byte"
    assert seen == tensors


def test_a_block_that_is_read_late_holds_back_only_what_would_overwrite_it() -> None:
    kib = [TensorSpec(policy="base", name=str(index), dtype="uint8", shape=(1024,)) for index in range(5)]
    made = plan(kib, block_bytes=1024, ahead_bytes=1024)
    assert made.ring_bytes == 2048
    assert [block.start for block in made.blocks] == [0, 1024, 0, 1024, 0]
    assert [block.needs for block in made.blocks] == [0, 0, 1, 2, 3]


def test_floating_weights_are_described_in_the_dtype_that_is_served() -> None:
    weights = [("base", "a", torch.ones(2, 3)), ("base", "b", torch.ones(2, dtype=torch.int64))]
    assert [spec.dtype for spec in HeldWeights(weights, dtype=torch.bfloat16).specs] == ["bfloat16", "int64"]
    assert [spec.num_bytes for spec in HeldWeights(weights).specs] == [24, 16]
