"""Where weights come from: every source rank yields the same tensors, whole, in the same order, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mas_hpc.errors import LaunchError

NamedTensor = tuple[str, str, Tensor]
"""(policy, name, tensor), as in rollout.engine.Weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a tensor looks like to those who receive it.

    Example: TensorSpec(policy="base", name="lm_head.weight", dtype="bfloat16", shape=(49152, 576))
    """

    policy: str
    name: str
    dtype: str
    """Attribute of torch."""
    shape: tuple[int, ...]
    """Of the whole tensor, also where ranks hold shards of it."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


class Source(Protocol):
    """Weights on their way out. Iterating is collective among the source ranks where they hold shards."""

    specs: tuple[TensorSpec, ...]
    """Of every tensor, in order; the same on all source ranks."""

    def __iter__(self) -> Iterator[NamedTensor]:
        """Whole tensors in the order of `specs`; each is valid until the next one is asked for."""
        ...


class HeldWeights:
    """Tensors that each source rank holds whole (one process, DDP), or as a shard (FSDP2, any mesh and placement).

    A shard is gathered when its turn comes and dropped after it: never more than one whole tensor beside the shards.
    `dtype` is what the engines serve (None: what the trainer has); integers stay what they are.
    Example: HeldWeights(named_weights(model, bank, ["solver"]))
    """

    def __init__(self, weights: Iterable[NamedTensor], *, dtype: torch.dtype | None = None) -> None:
        self._weights = [(policy, name, tensor.detach()) for policy, name, tensor in weights]
        self.specs = tuple(_spec(policy, name, tensor, tensor.shape, dtype) for policy, name, tensor in self._weights)

    def __iter__(self) -> Iterator[NamedTensor]:
        """See Source."""
        for policy, name, tensor in self._weights:
            yield policy, name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ZeroWeights:
    """Parameters that DeepSpeed's ZeRO-3 has partitioned, gathered `gather_bytes` at a time (extra: deepspeed).

    Raises LaunchError when deepspeed is missing.
    Example: ZeroWeights(("base", name, parameter) for name, parameter in engine.module.named_parameters())
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, str, nn.Parameter]],
        *,
        dtype: torch.dtype | None = None,
        gather_bytes: int = 64 << 20,
    ) -> None:
        try:
            from deepspeed import zero
        except ImportError as error:
            raise LaunchError(f"weights of ZeRO-3 need deepspeed ({error}): pip install 'mas-hpc[deepspeed]'") from error
        self._gathered: Any = zero.GatheredParameters
        self._weights = list(weights)
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for _, _, parameter in self._weights]
        self.specs = tuple(
            _spec(policy, name, parameter, shape, dtype)
            for (policy, name, parameter), shape in zip(self._weights, shapes, strict=True)
        )
        self._gather_bytes = gather_bytes

    def __iter__(self) -> Iterator[NamedTensor]:
        """See Source."""
        start = 0
        for stop in _cuts([spec.num_bytes for spec in self.specs], self._gather_bytes):
            group = self._weights[start:stop]
            with self._gathered([parameter for _, _, parameter in group]):
                for policy, name, parameter in group:
                    yield policy, name, parameter.detach()
            start = stop


def _spec(policy: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None) -> TensorSpec:
    served = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
    return TensorSpec(policy=policy, name=name, dtype=str(served).removeprefix("torch."), shape=tuple(shape))


def _cuts(sizes: Sequence[int], limit: int) -> Iterator[int]:
    """Ends of runs of at most `limit` in total; a larger item is a run of its own."""
    total = 0
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            yield index
            total = 0
        total += size
    if sizes:
        yield len(sizes)
