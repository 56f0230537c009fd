"""Fully sharded data parallelism: every rank holds a part of each weight, gradient and optimizer state (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.ddp import sum_gradients
from mas_hpc.distributed.device import new_mesh
from mas_hpc.distributed.exchange import gather_values
from mas_hpc.distributed.strategy import BuildOptimizer, Groups
from mas_hpc.distributed.tensor_layers import TensorGroup
from mas_hpc.distributed.trained_state import Fill, assign, give_memory, start_optimizer, state_of, trained_parameters
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError


class FullySharded:
    """Strategy; each block of layers is gathered when its turn comes, and its gradients go back as shards.

    Under adapters the frozen base is sharded; the adapters, megabytes, are whole on every rank.
    """

    shards = lockstep = True
    tensor: TensorGroup | None = None

    def __init__(self, world: World, settings: DistributedConfig, mesh: DeviceMesh | None = None) -> None:
        """Of the ranks of a mesh, or of all."""
        self.world, self._settings = world, settings
        self._mesh = mesh or _mesh(world, settings.shard_size)

    def train(self, module: nn.Module, groups: Groups, build: BuildOptimizer, fill: Fill | None = None) -> ShardedModule:
        """See Strategy. Raises ConfigError for an optimizer that cannot step on shards."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        by_group = {group: [names[id(parameter)] for parameter in parameters] for group, parameters in groups.items()}
        trained = {name for members in by_group.values() for name in members}
        has_frozen = trained < set(names.values())
        self._shard(module, whole=trained if has_frozen else set())
        give_memory(module, torch.device("cpu") if self._settings.offload else self.world.device)
        if fill:
            fill({name: parameter.detach() for name, parameter in module.named_parameters()})
        return ShardedModule(self.world, module, by_group, build)

    def freeze(self, module: nn.Module) -> nn.Module:
        """See Strategy."""
        self._shard(module, whole=set())
        return module

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """See Strategy."""
        return gather_values(self.world, values)

    def _shard(self, module: nn.Module, whole: set[str]) -> None:
        """Shard the blocks, then what is left; parameters of the names in `whole` stay as they are."""
        ignored = {parameter for name, parameter in module.named_parameters() if name in whole}
        own = MixedPrecisionPolicy()  # a head computes in its own type, whatever that of the model
        heads = [(head, own) for head in _heads(module) if not ignored.issuperset(head.parameters())]
        for part, policy in [*((block, self._precision()) for block in blocks(module)), *heads, (module, self._precision())]:
            fully_shard(part, mesh=self._mesh, mp_policy=policy, offload_policy=self._offload(), ignored_params=ignored)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # neither gloo nor xccl multiplies on the way

    def _precision(self) -> MixedPrecisionPolicy:
        dtype = self._settings.compute_dtype
        if dtype == "same":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)

    def _offload(self) -> OffloadPolicy:
        on_cpu = self._mesh.device_type == "cpu"
        return CPUOffloadPolicy(pin_memory=not on_cpu) if self._settings.offload else OffloadPolicy()


class ShardedModule:
    """TrainedModule of which every rank holds a part."""

    def __init__(self, world: World, module: nn.Module, groups: dict[str, list[str]], build: BuildOptimizer) -> None:
        self._world, self.module = world, module
        parameters = dict(module.named_parameters())
        self.groups = {group: [parameters[name] for name in names] for group, names in groups.items()}
        self.optimizer = build(self.groups.values())
        has_shards = any(isinstance(parameter, DTensor) for parameter in parameters.values() if parameter.requires_grad)
        if has_shards and isinstance(self.optimizer, torch.optim.Adafactor):
            raise ConfigError(
                "method.optimizer=adafactor: torch's cannot take norms of shards; set it to adamw, or distributed.strategy=ddp"
            )

    def zero_grad(self) -> None:
        """See TrainedModule."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See TrainedModule; gradients are added up where they are and reduced after the last pass."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(is_last)
        loss.backward()

    def clip(self, active: Sequence[str], max_norm: float) -> dict[str, float]:
        """See TrainedModule."""
        whole = [p for group in active for p in self.groups[group] if not isinstance(p, DTensor)]
        sum_gradients(self._world, whole)
        return {group: _whole(nn.utils.clip_grad_norm_(self.groups[group], max_norm)).item() for group in active}

    def step(self) -> None:
        """See TrainedModule."""
        self.optimizer.step()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """See TrainedModule."""
        for name, parameter in trained_parameters(self._resharded(), self.optimizer).items():
            yield name, _whole(parameter.detach())

    def state(self) -> dict[str, Tensor]:
        """See TrainedModule."""
        return state_of(self._resharded(), self.optimizer)

    def restore(self, fill: Fill, started: Collection[str]) -> None:
        """See TrainedModule."""
        start_optimizer(self._resharded(), self.optimizer, started)
        fill(self.state())

    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """See TrainedModule."""
        assign(self._resharded(), self.optimizer, parameters)

    def _resharded(self) -> nn.Module:
        """The module with its own parameters: a pass without gradients leaves gathered ones in the place of some."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return self.module


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that transformers names as those that belong together."""
    kinds = {kind for part in module.modules() for kind in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in kinds]


def _heads(module: nn.Module) -> list[nn.Module]:
    """What stands beside a model of blocks."""
    parts = list(module.children())
    return [part for part in parts if not blocks(part)] if any(map(blocks, parts)) else []


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mesh(world: World, shard_size: int) -> DeviceMesh:
    """All ranks in one row, or copies of `shard_size` ranks each (HSDP). Raises ConfigError where that does not divide them."""
    if not shard_size or shard_size == world.size:
        return new_mesh(world.device.type, (world.size,))
    if world.size % shard_size:
        raise ConfigError(
            f"distributed.shard_size={shard_size}: {world.size} ranks are not a multiple of it; set it to a divisor of the "
            "number of ranks, or 0 for all of them"
        )
    return new_mesh(world.device.type, (world.size // shard_size, shard_size), ("replicate", "shard"))
