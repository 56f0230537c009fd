"""RMS norms and rotary embeddings in fewer calls than the library makes: for few rows the calls take longer than the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
"""Whose norms and rotary embeddings compute what torch's op and `Rotary` do, and nothing else."""
RMS_NORMS = frozenset(f"{family}RMSNorm" for family in FAMILIES)
ATTENTIONS = frozenset(f"{family}Attention" for family in FAMILIES)
ROTARY = "apply_rotary_pos_emb"
"""What attention calls the library's function."""


class LeanCalls:
    """A model's RMS norms, those in float32 (the library computes others in float32, too), and its rotary embeddings."""

    def __init__(self, model: nn.Module) -> None:
        modules = [(type(module).__name__, module) for module in model.modules()]
        norms = [module for name, module in modules if name in RMS_NORMS]
        self._norms = [norm for norm in norms if next(norm.parameters()).dtype == torch.float32]
        self._attentions: list[tuple[nn.Module, Callable[..., Any]]] = []
        rotary = Rotary()
        for attention in [module for name, module in modules if name in ATTENTIONS]:
            forward = type(attention).forward
            if isinstance(forward, FunctionType) and ROTARY in forward.__code__.co_names:
                self._attentions.append((attention, MethodType(_calling(forward, rotary), attention)))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the model computes by these, from the weights as they are. For inference only: no gradient passes them."""
        assert torch.is_inference_mode_enabled()
        forwards = list(self._attentions)
        for norm in self._norms:  # a weight may be another tensor than before
            weight, eps = next(norm.parameters()), cast(float, norm.variance_epsilon)
            forwards.append((norm, partial(F.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=eps)))
        for module, forward in forwards:
            setattr(module, "forward", forward)  # noqa: B010
        try:
            yield
        finally:
            for module, _ in forwards:
                del module.forward


class Rotary:
    """Turns pairs of a query's and a key's elements by their angles, as the library's function does (arXiv 2104.09864).

    That multiplies (-second half, first half) by the sines; here the sines carry the sign, once for all layers.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """Return both turned; `cos` and `sin` lack their dimension of heads."""
        half = sin.shape[-1] // 2
        if sin is not self._seen:
            self._seen, self._cos = sin, cos.unsqueeze(unsqueeze_dim)
            self._sin = torch.cat([-sin[..., :half], sin[..., half:]], -1).unsqueeze(unsqueeze_dim)
        turned_query = torch.addcmul(query * self._cos, query.roll(half, -1), self._sin)
        return turned_query, torch.addcmul(key * self._cos, key.roll(half, -1), self._sin)


def _calling(forward: FunctionType, rotary: Rotary) -> FunctionType:
    """The library's own function, for which the name of the rotary embedding means ours."""
    names = {**forward.__globals__, ROTARY: rotary}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
