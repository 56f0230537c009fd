"""Data parallelism: every rank holds all weights and trains on its share of the trees."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from mas_hpc.distributed.exchange import gather_values
from mas_hpc.distributed.strategy import BuildOptimizer, Groups
from mas_hpc.distributed.tensor_layers import TensorGroup
from mas_hpc.distributed.trained_state import Fill, assign, give_memory, start_optimizer, state_of, trained_parameters
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError

BUCKET_BYTES = 64 << 20


class DataParallel:
    """Strategy for one rank or several; gradients travel in flat buckets (1.6x to 3.5x faster than one by one)."""

    shards = lockstep = False
    tensor: TensorGroup | None = None

    def __init__(self, world: World, *, compute_dtype: str = "same") -> None:
        self.world, self._compute_dtype = world, compute_dtype

    def train(self, module: nn.Module, groups: Groups, build: BuildOptimizer, fill: Fill | None = None) -> Replica:
        """See Strategy. Raises ConfigError for a compute_dtype other than the weights'."""
        if self._compute_dtype != "same":
            raise ConfigError(
                f"distributed.compute_dtype={self._compute_dtype}: one rank trains in model.dtype, whatever "
                "distributed.strategy; set it to same, or start more ranks"
            )
        give_memory(module, self.world.device)
        if fill:
            fill({name: parameter.detach() for name, parameter in module.named_parameters()})
        return Replica(self, module, groups, build)

    def freeze(self, module: nn.Module) -> nn.Module:
        """See Strategy."""
        return module

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """See Strategy."""
        return gather_values(self.world, values)

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """See sum_gradients."""
        sum_gradients(self.world, parameters)


class Replica:
    """TrainedModule of which every rank holds all."""

    def __init__(self, strategy: DataParallel, module: nn.Module, groups: Groups, build: BuildOptimizer) -> None:
        self._strategy, self.module = strategy, module
        self.groups = {name: list(parameters) for name, parameters in groups.items()}
        self.optimizer = build(self.groups.values())

    def zero_grad(self) -> None:
        """See TrainedModule."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See TrainedModule."""
        loss.backward()

    def clip(self, active: Sequence[str], max_norm: float) -> dict[str, float]:
        """See TrainedModule."""
        self._strategy.sum_gradients([parameter for group in active for parameter in self.groups[group]])
        return {group: float(nn.utils.clip_grad_norm_(self.groups[group], max_norm)) for group in active}

    def step(self) -> None:
        """See TrainedModule."""
        self.optimizer.step()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """See TrainedModule."""
        parameters = trained_parameters(self.module, self.optimizer)
        yield from ((name, parameter.detach()) for name, parameter in parameters.items())

    def state(self) -> dict[str, Tensor]:
        """See TrainedModule."""
        return state_of(self.module, self.optimizer)

    def restore(self, fill: Fill, started: Collection[str]) -> None:
        """See TrainedModule."""
        start_optimizer(self.module, self.optimizer, started)
        fill(self.state())

    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """See TrainedModule."""
        assign(self.module, self.optimizer, parameters)


def sum_gradients(world: World, parameters: Sequence[Parameter]) -> None:
    """Replace every gradient by its sum over ranks; a missing one counts as zero, unless all ranks miss it. Collective."""
    if world.size == 1 or not parameters:
        return
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(present, dist.ReduceOp.MAX, group=world.control)
    used = [parameter for parameter, is_used in zip(parameters, present.tolist(), strict=True) if is_used]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(used):
        flat = torch.cat([parameter.grad.flatten() for parameter in bucket])  # type: ignore[union-attr]
        dist.all_reduce(flat, group=world.group)
        for parameter, block in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = block.view_as(parameter)


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    buckets: list[list[Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if buckets[-1] and (size + num_bytes > BUCKET_BYTES or parameter.dtype != buckets[-1][0].dtype):
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    return [bucket for bucket in buckets if bucket]
