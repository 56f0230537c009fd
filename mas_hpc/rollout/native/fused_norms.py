"""RMS norms by the one op of torch, where the library makes eight calls: for few rows these take longer than the sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

RMS_NORMS = frozenset(f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"))
"""Classes of the library that compute weight * x / sqrt(mean(x^2) + variance_epsilon), and nothing else."""


class FusedNorms:
    """A model's RMS norms, those in float32: the library computes others in float32, too, which the op does not."""

    def __init__(self, model: nn.Module) -> None:
        found = [module for module in model.modules() if type(module).__name__ in RMS_NORMS]
        self._norms = [norm for norm in found if next(norm.parameters()).dtype == torch.float32]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the model's norms are computed by the op, from the weights as they are."""
        for norm in self._norms:
            weight = next(norm.parameters())
            fused = partial(
                F.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=cast(float, norm.variance_epsilon)
            )
            setattr(norm, "forward", fused)  # noqa: B010
        try:
            yield
        finally:
            for norm in self._norms:
                del norm.forward
