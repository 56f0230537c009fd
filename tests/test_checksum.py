"""The checksum of weights finds every single change, and nothing else changes it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mas_hpc.checksum import Checksum, checksum

Named = list[tuple[str, str, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


@st.composite
def named_tensors(draw: st.DrawFn) -> Named:
    sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in sizes]
    return [
        ("solver" if index % 2 else "base", f"layer.{index}", (torch.randn(size, generator=generator) * 99).to(dtype))
        for index, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
    ]


def copies(weights: Named) -> Named:
    return [(policy, name, tensor.clone()) for policy, name, tensor in weights]


@given(named_tensors(), st.data())
def test_any_changed_bit_is_found(weights: Named, data: st.DataObject) -> None:
    changed = copies(weights)
    raw = data.draw(st.sampled_from(changed))[2].view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(changed) != checksum(weights)


@given(named_tensors(), st.data())
def test_two_elements_that_changed_places_are_found(weights: Named, data: st.DataObject) -> None:
    changed = copies(weights)
    tensor = data.draw(st.sampled_from(changed))[2]
    first, second = (data.draw(st.integers(0, len(tensor) - 1)) for _ in range(2))
    moved = bool(tensor[first] != tensor[second])
    tensor[[first, second]] = tensor[[second, first]]
    assert (checksum(changed) != checksum(weights)) == moved


@given(named_tensors())
def test_two_tensors_that_changed_names_or_policies_are_found(weights: Named) -> None:
    (policy, name, one), (other_policy, other_name, _), *rest = weights
    two = one + 1
    before = checksum([(policy, name, one), (other_policy, other_name, two), *rest])
    assert checksum([(policy, name, two), (other_policy, other_name, one), *rest]) != before
    assert checksum([(other_policy, name, one), (policy, other_name, two), *rest]) != before


@given(named_tensors())
def test_order_and_memory_layout_do_not_count(weights: Named) -> None:
    assert checksum(reversed(weights)) == checksum(weights)
    flat = torch.zeros(3, 5)
    assert checksum([("base", "a", flat.T)]) == checksum([("base", "a", flat.T.contiguous())])
    total = Checksum()
    for policy, name, tensor in weights:
        total.add(policy, name, torch.stack([tensor, tensor], dim=1)[:, 0])
    assert str(total) == checksum(weights)


def test_dtype_and_shape_count_where_the_bytes_are_the_same() -> None:
    zeros = torch.zeros(4)
    variants = [zeros, zeros.view(torch.int32), zeros.view(2, 2), zeros.view(4, 1), zeros.view(torch.bfloat16)]
    assert len({checksum([("base", "a", tensor)]) for tensor in variants}) == len(variants)


def test_a_missing_tensor_is_found_and_nothing_at_all_is_empty() -> None:
    weights = [("base", "a", torch.ones(2)), ("base", "b", torch.ones(()))]
    assert checksum(weights) != checksum(weights[:1]) != ""
    assert checksum([]) == ""
    with pytest.raises(AssertionError, match="a of policy 'base' comes twice"):
        checksum([weights[0], weights[0]])
