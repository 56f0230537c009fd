"""The forward passes of rollout: a chunk of prompts and one token of each decoding row, in one flat row.

Legend: F tokens of a chunk's forest, N its new ones, B decoding rows, T = N + B, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mas_hpc.distributed.tensor_layers import group_of
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import Attend, hidden_states
from mas_hpc.models.flex_attention import tree_attention
from mas_hpc.prefix_tree import IntArray
from mas_hpc.rollout.native.decode_attention import DecodeAttention
from mas_hpc.rollout.native.kv_pool import KVPool
from mas_hpc.rollout.native.lean_calls import LeanCalls
from mas_hpc.rollout.native.packed_linear import PackedLinears
from mas_hpc.rollout.native.prefill import Chunk


class Runner:
    """A prepared model and its adapters, or this rank's part of its layers. Raises nothing of its own."""

    def __init__(self, model: PreTrainedModel, bank: AdapterBank | None) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.tensor = group_of(model)
        self.vocabulary: int = self.head.out_features if self.tensor else len(self.head.weight)
        self.packed = PackedLinears(model)
        self.lean = LeanCalls(model)
        self._bank = bank
        self._device = model.device

    def prefill(self, chunk: Chunk, pool: KVPool) -> Tensor:
        """Run a chunk; return the hidden states of its new tokens, [N, E]."""
        token_N, position_N, adapter_N = self._columns(chunk)
        return self._hidden(token_N, position_N, adapter_N, PrefillAttention(chunk, pool))

    def decode(self, token_B: Sequence[int], position_B: Tensor, adapter_B: Tensor, attend: DecodeAttention) -> Tensor:
        """Feed one token a row; return hidden states, [B, E]."""
        attend.advance()
        return self._hidden(self._tensor(token_B), position_B, adapter_B, attend)

    def both(
        self, chunk: Chunk, pool: KVPool, token_B: Sequence[int], position_B: Tensor, adapter_B: Tensor, attend: DecodeAttention
    ) -> tuple[Tensor, Tensor]:
        """A chunk and a decoding step as one pass over the weights; hidden states of both."""
        attend.advance()
        mixed = MixedAttention(PrefillAttention(chunk, pool), len(chunk), attend)
        token_N, position_N, adapter_N = self._columns(chunk)
        hidden_TE = self._hidden(
            torch.cat([token_N, self._tensor(token_B)]), torch.cat([position_N, position_B]), torch.cat([adapter_N, adapter_B]),
            mixed,
        )  # fmt: skip
        return hidden_TE[: len(chunk)], hidden_TE[len(chunk) :]

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """The LM head, of the whole vocabulary. Collective in the tensor group."""
        logits = self.head(hidden_BE)
        return self.tensor.join(logits, self.vocabulary) if self.tensor else logits

    def _hidden(self, token_T: Tensor, position_T: Tensor, adapter_T: Tensor, attend: Attend) -> Tensor:
        with self._route(adapter_T):
            return hidden_states(self.model, token_T, position_T, attend)

    def _route(self, adapter_T: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._bank is None else self._bank.route(adapter_T)

    def _columns(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        return self._tensor(chunk.token_N), self._tensor(chunk.position_N), self._tensor(chunk.adapter_N)

    def _tensor(self, values: Sequence[int] | IntArray) -> Tensor:
        return torch.as_tensor(values, device=self._device)


class PrefillAttention:
    """An `Attend` over a chunk (T = N): keys and values go to their slots, and come from there with those of the ancestors."""

    def __init__(self, chunk: Chunk, pool: KVPool) -> None:
        device = pool.shape.device
        query_N = chunk.query_N
        self._tree = tree_attention(chunk.leave_F, queries=query_N, device=device)
        self._pool = pool
        stored = chunk.is_stored_N
        self._slot_N = torch.from_numpy(chunk.slot_F[query_N[stored]]).to(device)
        self._stored_N = None if stored.all() else torch.from_numpy(stored).to(device)
        is_whole = stored.all() and len(query_N) == len(chunk.slot_F)
        self._slot_F = None if is_whole else torch.from_numpy(chunk.slot_F).to(device)
        pool.reach(self._slot_N)

    def __call__(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [N, H, D]."""
        chosen = (key_KTD, value_KTD) if self._stored_N is None else (key_KTD[:, self._stored_N], value_KTD[:, self._stored_N])
        self._pool.write(layer, self._slot_N, *chosen)
        if self._slot_F is not None:
            key_KTD, value_KTD = self._pool.read(layer, self._slot_F)
        return self._tree(layer, query_HTD, key_KTD, value_KTD, scaling)


class MixedAttention:
    """An `Attend` whose first tokens are a chunk and whose others are one token a decoding row."""

    def __init__(self, prefill: PrefillAttention, num_prefill: int, decode: DecodeAttention) -> None:
        self._prefill, self._count, self._decode = prefill, num_prefill, decode

    def __call__(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [T, H, D]."""
        heads, count = (query_HTD, key_KTD, value_KTD), self._count
        new_heads, row_heads = [part[:, :count] for part in heads], [part[:, count:] for part in heads]
        new = self._prefill(layer, new_heads[0], new_heads[1], new_heads[2], scaling)
        rows = self._decode(layer, row_heads[0], row_heads[1], row_heads[2], scaling)
        return torch.cat([new, rows])
