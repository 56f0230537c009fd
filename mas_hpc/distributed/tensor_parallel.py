"""Tensor parallelism beside data parallelism: ranks in groups that compute each layer together, and train on the same trees."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.device import lay_out
from mas_hpc.distributed.exchange import gather_values
from mas_hpc.distributed.fsdp2 import FullySharded
from mas_hpc.distributed.strategy import BuildOptimizer, Groups, TrainedModule
from mas_hpc.distributed.tensor_layers import Cut, Layout, TensorGroup, cut, group_of
from mas_hpc.distributed.trained_state import Fill, give_memory, trained_parameters
from mas_hpc.distributed.world import COLLECTIVE_TIMEOUT, World
from mas_hpc.errors import ConfigError


class TensorParallel:
    """Strategy of two dimensions: neighbouring ranks, such as the tiles of a card, share layers; groups share the trees.

    `world` is this rank's place among the ranks that have the same part of the layers: they share out the trees as
    `distributed.strategy` says, and what the ranks of one group do is the same.
    """

    def __init__(self, world: World, settings: DistributedConfig) -> None:
        """Collective. Raises ConfigError for ranks that do not divide into groups, or whose groups span hosts."""
        size = settings.tensor_parallel
        _check_ranks(world, size)
        ranks = torch.arange(world.size).view(-1, size).T.contiguous()
        copies = settings.shard_size or ranks.shape[1]
        if ranks.shape[1] % copies:
            raise ConfigError(
                f"distributed.shard_size={copies}: {world.size} ranks in groups of {size} (distributed.tensor_parallel) leave "
                f"{ranks.shape[1]}, which are not a multiple of it; set it to a divisor, or 0 for all of them"
            )
        self._mesh = lay_out(world.device.type, ranks.view(size, -1, copies), ("tensor", "replicate", "shard"))
        flat = lay_out(world.device.type, ranks, ("tensor", "data"))
        control, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        inside, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._tensor = TensorGroup(
            rank=world.rank % size, size=size, group=self._mesh.get_group("tensor"), control=inside
        )  # fmt: skip
        self.tensor: TensorGroup | None = self._tensor
        self.world = replace(
            world, rank=world.rank // size, size=ranks.shape[1], control=control, group=flat.get_group("data"),
            hosts=world.hosts[world.rank % size :: size],
        )  # fmt: skip
        own = PrefixStore("leaders", world.store) if world.store and self.world.size > 1 else None
        self.leaders = replace(self.world, store=own, run_store=None)
        """The first ranks of the groups, which play episodes where groups serve together, by a store of their own."""
        self._inner: DataParallel | FullySharded
        if settings.strategy == "fsdp2":
            dims = ("replicate", "shard") if copies < ranks.shape[1] else ("shard",)
            self._inner = FullySharded(self.world, settings, mesh=self._mesh[dims])
        else:
            self._inner = DataParallel(self.world)
        self.lockstep, self.shards = self._inner.lockstep, True

    def train(self, module: nn.Module, groups: Groups, build: BuildOptimizer, fill: Fill | None = None) -> CutModule:
        """See Strategy. Raises ConfigError for a model that cannot be cut, and an optimizer that reads whole weights."""
        serves_parts = group_of(module) is not None
        layout = cut(module, self._tensor)
        trained = CutModule(
            self._inner.train(module, groups, build), layout, self._tensor, self._mesh, serves_parts=serves_parts
        )  # fmt: skip
        if fill:
            fill(trained.everything(module))
        return trained

    def freeze(self, module: nn.Module) -> nn.Module:
        """See Strategy."""
        cut(module, self._tensor)
        return self._inner.freeze(module)

    def keep_part(self, model: nn.Module, fill: Fill | None = None) -> None:
        """Leave this rank's part of a model that serves, on its device; `fill` reads one on meta. Raises ConfigError.

        Where ranks of other groups have no less than that, it is trained in place: nothing is copied from then on.
        """
        self.shards = self._inner.shards
        layout = cut(model, self._tensor)
        give_memory(model, self.world.device)
        model.to(self.world.device)
        if fill:
            tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
            fill({name: self._part(tensor, layout.cuts.get(name)) for name, tensor in tensors.items()})

    @property
    def group_number(self) -> int:
        """Which of the groups of ranks that share layers is this one's."""
        return self.world.rank

    @torch.no_grad()
    def make_whole(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of a model that was cut, by its name; each is valid until the next is asked for. Collective."""
        layout = cut(model, self._tensor)
        for name, parameter in model.named_parameters():
            where = layout.cuts.get(name)
            yield name, self._part(parameter.detach(), where).full_tensor() if where else parameter.detach()  # type: ignore[attr-defined]

    def _part(self, tensor: Tensor, where: Cut | None) -> Tensor:
        """The same memory as a part of the whole."""
        return part_of_whole(tensor, where, self._mesh["tensor"], ()) if where else tensor

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """See Strategy; of one rank a group, as the others would say the same."""
        return gather_values(self.world, values)


class CutModule:
    """TrainedModule of which every rank has a part of the layers, and of that what the inner one leaves it."""

    def __init__(
        self, inner: TrainedModule, layout: Layout, tensor: TensorGroup, mesh: DeviceMesh, *, serves_parts: bool
    ) -> None:  # fmt: skip
        """With `serves_parts` what serves is cut as well."""
        self._inner, self._layout, self._tensor, self._mesh, self._serves_parts = inner, layout, tensor, mesh, serves_parts
        self.module, self.groups, self.optimizer = inner.module, inner.groups, inner.optimizer
        if isinstance(self.optimizer, torch.optim.Adafactor):
            raise ConfigError(
                "method.optimizer=adafactor: it takes norms of whole weights, of which a rank has a part; set it to adamw, or "
                "distributed.tensor_parallel=1"
            )
        self._names = {id(parameter): name for name, parameter in trained_parameters(self.module, self.optimizer).items()}

    def zero_grad(self) -> None:
        """See TrainedModule."""
        self._inner.zero_grad()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See TrainedModule."""
        self._inner.backward(loss, is_last=is_last)

    @torch.no_grad()
    def clip(self, active: Sequence[str], max_norm: float) -> dict[str, float]:
        """See TrainedModule."""
        self._sum_partial(active)
        self._inner.clip(active, math.inf)
        norms = {}
        for group in active:
            gradients = {self._names[id(p)]: p.grad for p in self.groups[group] if p.grad is not None}
            norms[group] = self._norm(gradients)
            if norms[group] > max_norm:
                for gradient in gradients.values():
                    gradient.mul_(max_norm / (norms[group] + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        return norms

    def _sum_partial(self, active: Sequence[str]) -> None:
        """Make the gradients of whole parameters whole."""
        parameters = [p for group in active for p in self.groups[group] if self._names[id(p)] in self._layout.partial]
        gradients = [_local(p.grad) for p in parameters if p.grad is not None]
        if gradients:
            joined = self._tensor.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
            for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Over all ranks: parts are added up, and what is whole counts once."""
        parts = [gradient for name, gradient in gradients.items() if name in self._layout.cuts]
        whole = [gradient for name, gradient in gradients.items() if name not in self._layout.cuts]
        squares = [_full(nn.utils.get_total_norm(kind)).double().square() for kind in (parts, whole)]
        return float((self._tensor.reduce(squares[0], "sum") + squares[1]).sqrt())

    def step(self) -> None:
        """See TrainedModule."""
        self._inner.step()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """See TrainedModule; this rank's part, gathered from those with the same part, where that is what serves."""
        for name, tensor in self._inner.whole():
            is_joined = name in self._layout.cuts and not self._serves_parts
            yield name, self._view(name, tensor, self._mesh["tensor"], ()).full_tensor() if is_joined else tensor

    def state(self) -> dict[str, Tensor]:
        """See TrainedModule."""
        return self._views(self._inner.state())

    def everything(self, module: nn.Module) -> dict[str, Tensor]:
        """Every parameter by its name, as `state` gives those that are trained."""
        return {name: self._seen(name, parameter.detach()) for name, parameter in module.named_parameters()}

    def restore(self, fill: Fill, started: Collection[str]) -> None:
        """See TrainedModule."""
        self._inner.restore(lambda tensors: fill(self._views(tensors)), started)

    @torch.no_grad()
    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """See TrainedModule."""
        for name, tensor in self.state().items():
            kind, _, own = name.partition("/")
            if kind == "parameter":
                tensor.copy_(parameters[own])

    def _views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `state` calls parameter/<name> and optimizer/<name>/<key>, as parts of the whole."""
        found = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            found[key] = self._seen(name if kind == "parameter" else name.rpartition("/")[0], tensor)
        return found

    def _seen(self, name: str, tensor: Tensor) -> Tensor:
        """The same memory as a part of the whole parameter, or of an optimizer state of its shape."""
        if tensor.ndim == 0 or not (name in self._layout.cuts or isinstance(tensor, DTensor)):
            return tensor
        placements: tuple[Placement, ...] = tensor.placements if isinstance(tensor, DTensor) else (Replicate(),)
        return self._view(name, tensor, self._mesh, (Replicate(),) * (2 - len(placements)) + placements)

    def _view(self, name: str, tensor: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
        return part_of_whole(tensor, self._layout.cuts.get(name), mesh, placements)


def part_of_whole(tensor: Tensor, where: Cut | None, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """The same memory as a part of the whole tensor.

    The layers are cut first, so that is the first dimension of the mesh; `placements` are those of the others.
    """
    shape = list(tensor.shape)
    if where:
        shape[where.dim] = where.length
    first = Shard(where.dim) if where else Replicate()
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        _local(tensor), mesh, (first, *placements), run_check=False, shape=torch.Size(shape), stride=stride
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_ranks(world: World, size: int) -> None:
    key = f"distributed.tensor_parallel={size}"
    if world.size % size:
        raise ConfigError(
            f"{key}: {world.size} ranks do not divide into groups of {size}; start a multiple of {size} ranks, or leave it out"
        )
    for first in range(0, world.size, size):
        hosts = set(world.hosts[first : first + size])
        if len(hosts) > 1:
            raise ConfigError(
                f"{key}: ranks {first} to {first + size - 1} would share each layer over the network, as they are on "
                f"{' and '.join(sorted(hosts))}; start a multiple of {size} ranks a host, or leave it out"
            )
