"""The memory behind the KV tree: one slot a token, for all layers.

Legend: L layers, 2 key and value, K key/value heads, P slots, D head dimension, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

FIRST_SLOTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What one token's keys and values are.

    Example: KVShape(layers=30, heads=3, dim=64, dtype=torch.float32, device=torch.device("cpu")).token_bytes == 46080
    """

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, *, parts: int = 1) -> KVShape:
        """Read from a model's configuration; heads and their dimension have defaults in the library, too.

        Of `parts` ranks that share the layers, each has its part of the heads.
        """
        heads = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) // parts
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KVShape(layers=config.num_hidden_layers, heads=heads, dim=dim, dtype=dtype, device=device)

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.heads * self.dim * self.dtype.itemsize


class KVPool:
    """Slots that grow by doubling up to `capacity`, so that memory is taken when it is used."""

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.kv_L2KPD = torch.empty(shape.layers, 2, shape.heads, 0, shape.dim, dtype=shape.dtype, device=shape.device)

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken."""
        return self.kv_L2KPD.shape[3] * self.shape.token_bytes

    def reach(self, slot_T: Tensor) -> None:
        """Make sure that these slots exist."""
        size, wanted = self.kv_L2KPD.shape[3], int(slot_T.max()) + 1 if len(slot_T) else 0
        if wanted <= size:
            return
        shape = list(self.kv_L2KPD.shape)
        shape[3] = min(self.capacity, max(wanted, 2 * size, FIRST_SLOTS))
        grown = self.kv_L2KPD.new_empty(shape)
        grown[:, :, :, :size] = self.kv_L2KPD
        self.kv_L2KPD = grown

    def write(self, layer: int, slot_T: Tensor, key_KTD: Tensor, value_KTD: Tensor) -> None:
        """Fill slots in one layer."""
        self.kv_L2KPD[layer, 0].index_copy_(1, slot_T, key_KTD)
        self.kv_L2KPD[layer, 1].index_copy_(1, slot_T, value_KTD)

    def read(self, layer: int, slot_T: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of slots in one layer, each [K, T, D]."""
        return self.kv_L2KPD[layer, 0].index_select(1, slot_T), self.kv_L2KPD[layer, 1].index_select(1, slot_T)

    def copy(self, slot_T: Tensor) -> Tensor:
        """Keys and values of slots in all layers, [L, 2, K, T, D]."""
        return self.kv_L2KPD.index_select(3, slot_T)
