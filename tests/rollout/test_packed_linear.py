"""The packed copies of linear layers give what the layers give, alone or as siblings of one product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mas_hpc.models.adapters import BankLinear, Route
from mas_hpc.rollout.native.packed_linear import PackedLinears


class Block(nn.Module):
    """Attention's projections, of which one has a bias, and one layer that has no siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(256, 256), nn.Linear(256, 64, bias=False), nn.Linear(256, 64)
        self.o_proj = nn.Linear(256, 256, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        query = self.q_proj(x)
        return [query, self.k_proj(x), self.v_proj(x), self.o_proj(query)]


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def both(block: Block, x: torch.Tensor) -> None:
    packed = PackedLinears(block)
    packed.pack()
    with torch.inference_mode():
        expected = block(x)
        with packed.used():
            found = block(x)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_each_layer_gives_its_own_part(block: Block) -> None:
    both(block, torch.randn(1, 5, 256))


def test_adapted_layers_are_packed_below_their_adapters(block: Block) -> None:
    route = Route()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(block, name, BankLinear(getattr(block, name), [torch.Generator().manual_seed(1)], 4, route))
        nn.init.normal_(getattr(block, name).lora_b[0])
    route.active, route.gate = (0,), torch.rand(5, 4)
    both(block, torch.randn(1, 5, 256))


def test_another_input_is_multiplied_anew(block: Block) -> None:
    packed = PackedLinears(block)
    packed.pack()
    with torch.inference_mode():
        one, two = torch.randn(1, 5, 256), torch.randn(1, 5, 256)
        expected = [block.q_proj(one), block.q_proj(two), block.k_proj(two), block.k_proj(one)]
        with packed.used():
            found = [block.q_proj(one), block.q_proj(two), block.k_proj(two), block.k_proj(one)]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_new_weights_are_used_once_packed_and_not_before(block: Block) -> None:
    packed, x = PackedLinears(block), torch.randn(1, 5, 256)
    packed.pack()
    with torch.no_grad():
        block.k_proj.weight.zero_()
    with torch.inference_mode(), packed.used():
        stale = block(x)[1]
    packed.pack()
    with torch.inference_mode(), packed.used():
        assert not block(x)[1].any() and stale.any()
