"""Floating-point operations that a model's passes need, and that a device could do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

PEAKS = {"Data Center GPU Max 1550": 298.2e12, "A100": 312e12, "H100": 989e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, as torchtitan/tools/utils.py counts them: of the first, one tile, with
512 operations x 448 units x 1.3 GHz."""
GEMM_SIZE = 512
GEMM_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What a dense decoder costs (PaLM, arXiv 2204.02311, appendix B), with what a tree of tokens shares counted once.

    A pass of T tree tokens, N predictors and A pairs of a token and one that it attends to (its path in the tree, and itself)
    takes forward 2 layers T + 2 head N + 4 attention A; backward as much for the activations, and for the weights
    2 trained T + 2 trained_head N, and 4 attention A, as both operands of attention have a gradient. What is computed again
    is not counted. With all weights trained that is 6 layers T + 6 head N + 12 attention A.

    Example: ModelCost(layers=1_000_000, trained=1_000_000, head=50_000, trained_head=50_000, attention=4096)
    """

    layers: int
    """Weights that every token meets: all but embeddings and head."""
    trained: int
    """Of these, those that are trained."""
    head: int
    """Weights of the LM head: vocabulary x width."""
    trained_head: int
    """`head` if it is trained, else 0."""
    attention: int
    """Layers x heads x width of a head."""

    @staticmethod
    def of(model: PreTrainedModel, adapters: int = 1, numel: Callable[[Tensor], int] = Tensor.numel) -> ModelCost:
        """Count a model's weights. `adapters` are the policies that share it: a token meets one of them."""
        head = model.get_output_embeddings().weight
        apart = {id(head), id(model.get_input_embeddings().weight)}
        kept = [parameter for parameter in model.parameters() if id(parameter) not in apart]
        trained = sum(numel(parameter) for parameter in kept if parameter.requires_grad)
        frozen = sum(numel(parameter) for parameter in kept if not parameter.requires_grad)
        if frozen:  # what is trained are the adapters
            trained //= adapters
        trained_head = numel(head) if head.requires_grad else 0
        return ModelCost(
            layers=frozen + trained, trained=trained, head=numel(head), trained_head=trained_head, attention=_attention(model)
        )  # fmt: skip

    def step(self, position_T: Tensor, predictors: int) -> float:
        """FLOPs of a pass forward and backward over a tree, whose tokens lie so deep in their paths."""
        tokens = len(position_T)
        attention = 4 * self.attention * (int(position_T.sum()) + tokens)
        forward = 2 * self.layers * tokens + 2 * self.head * predictors + attention
        return float(2 * forward + 2 * self.trained * tokens + 2 * self.trained_head * predictors + attention)


def _attention(model: PreTrainedModel) -> int:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * width


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one rank at most: a GPU's in bfloat16 by its name, a CPU's by a short measurement; None if unknown.

    Ranks that share a CPU measure at the same time, so each finds its share.
    """
    if device.type == "cpu":
        return measured_gemm(dtype)
    name = torch.get_device_module(device).get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name and dtype == torch.bfloat16), None)


def measured_gemm(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of square matrices, with the threads that torch uses."""
    left = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    right = torch.ones_like(left)
    fastest = float("inf")
    for _ in range(GEMM_REPEATS):
        began = time.perf_counter()
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * GEMM_SIZE**3 / fastest
