"""The forward passes of rollout: prefill a forest of prompts, decode one token a row.

Legend: T tree tokens, B rows, V vocabulary, E hidden size, G prompts; K, D, L, 2 as in kv_tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import Attend, hidden_states
from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.prefix_tree import IntArray, merge
from mas_hpc.rollout.native.kv_tree import Context, DecodeAttention
from mas_hpc.rollout.native.scheduler import Prompt

SKINNY = 16
"""Up to this many rows a CPU multiplies (W @ x.T).T faster than x @ W.T."""


class Runner:
    """A prepared model and its adapters. Raises nothing of its own."""

    def __init__(self, model: PreTrainedModel, bank: AdapterBank | None) -> None:
        self._model = model
        self.head = model.get_output_embeddings()
        self._bank = bank
        self._device = model.device

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[list[Context], int]:
        """Run each prefix of the prompts once; return their contexts and the number of tokens that were run."""
        tree = merge([prompt.token_ids for prompt in prompts], [prompt.adapters for prompt in prompts])
        attend = _Recording(TreeAttention(tree.leave_T, device=self._device))
        hidden_TE = self._hidden(
            self._tensor(tree.token_T), self._tensor(tree.position_T), self._tensor(tree.adapter_T), attend
        )
        kv_L2KTD = torch.stack([torch.stack(pair) for pair in attend.kv])
        contexts = [
            Context(tree_L2KTD=kv_L2KTD, path_C=self._tensor(index), hidden_E=hidden_TE[int(index[-1])].clone())
            for index in tree.path_index
        ]
        return contexts, len(tree)

    def decode(self, token_B: Sequence[int], position_B: Tensor, adapter_B: Tensor, attend: DecodeAttention) -> Tensor:
        """Feed one token a row; return the logits of the next, [B, V]."""
        attend.tails.advance()
        return self.logits(self._hidden(self._tensor(token_B), position_B, adapter_B, attend))

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """The LM head."""
        if len(hidden_BE) <= SKINNY and hidden_BE.device.type == "cpu" and self.head.bias is None:
            return (self.head.weight @ hidden_BE.T).T
        return self.head(hidden_BE)

    def _hidden(self, token_T: Tensor, position_T: Tensor, adapter_T: Tensor, attend: Attend) -> Tensor:
        with self._route(adapter_T):
            return hidden_states(self._model, token_T, position_T, attend)

    def _route(self, adapter_T: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._bank is None else self._bank.route(adapter_T)

    def _tensor(self, values: Sequence[int] | IntArray) -> Tensor:
        return torch.as_tensor(values, device=self._device)


class _Recording:
    """An `Attend` that keeps the keys and values of each layer."""

    def __init__(self, attend: Attend) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []
        self._attend = attend

    def __call__(self, layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        assert layer == len(self.kv)
        self.kv.append((key_KTD, value_KTD))
        return self._attend(layer, query_HTD, key_KTD, value_KTD, scaling)
