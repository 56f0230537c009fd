"""DeepSpeed's ZeRO (arXiv 1910.02054): optimizer states, gradients and weights are spread over the ranks in three stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.ddp import DataParallel, Replica
from mas_hpc.distributed.deepspeed_config import engine_settings, read_settings, stage_of
from mas_hpc.distributed.device import new_mesh
from mas_hpc.distributed.exchange import gather_values
from mas_hpc.distributed.strategy import BuildOptimizer, Groups, TrainedModule
from mas_hpc.distributed.tensor_layers import TensorGroup
from mas_hpc.distributed.trained_state import Fill
from mas_hpc.distributed.weight_source import ZeroWeights
from mas_hpc.distributed.world import World, tell_deepspeed
from mas_hpc.errors import ConfigError, LaunchError

KEYS = ("exp_avg", "exp_avg_sq")
"""AdamW's states that have the shape of the weight."""


class Zero:
    """Strategy of stage 1 (optimizer states are spread), 2 (gradients too) or 3 (weights too).

    Stages 1 and 2 train the module that serves, whose weights are whole on every rank. Under adapters they have nothing to
    spread but megabytes, so it is data parallelism; stage 3 then spreads the frozen base, and the adapters are whole. A
    model that only answers is spread in stage 3, and whole below it. Of bfloat16 weights the optimizer has float32 masters,
    so that small updates are not lost in rounding, as they are in one process. A weight that no loss reaches, such as the
    untied LM head of a reward model, counts as one with a gradient of zero.
    """

    lockstep = True
    tensor: TensorGroup | None = None

    def __init__(self, world: World, settings: DistributedConfig) -> None:
        self.world, self._stage = world, stage_of(settings)
        self.shards = self._stage == 3
        self._found = read_settings(settings)
        self._engines: list[tuple[Any, set[int]]] = []
        if find_spec("deepspeed") is None:
            raise LaunchError(
                f"distributed.strategy={settings.strategy} needs deepspeed: pip install 'mas-hpc[deepspeed]', or choose fsdp2"
            )

    def train(
        self, module: nn.Module, groups: Groups, build: BuildOptimizer, fill: Fill | None = None
    ) -> TrainedModule:  # fmt: skip
        """See Strategy. Raises ConfigError for weights of several types, and for an optimizer that reads their shapes."""
        assert fill is None, "DeepSpeed spreads weights that have memory"
        trained = [parameter for parameters in groups.values() for parameter in parameters]
        if len(trained) < len(list(module.parameters())):
            if self._stage == 3:
                with _without(module, trained):
                    self._open(module, None)
            return Replica(DataParallel(self.world), module, groups, build)
        (name,) = groups
        self._check(module)
        self._close(module)
        optimizer = build(groups.values())
        if not isinstance(optimizer, torch.optim.AdamW):
            raise ConfigError(
                f"method.optimizer={type(optimizer).__name__.lower()}: ZeRO spreads the weights as one flat row, and this "
                "optimizer reads their rows and columns; set it to adamw, or distributed.strategy=fsdp2"
            )
        return ZeroModule(self.world, name, self._open(module, optimizer), optimizer)

    def freeze(self, module: nn.Module) -> nn.Module:
        """See Strategy."""
        if self._stage == 3:
            self._open(module, None)
        return module

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """See Strategy."""
        return gather_values(self.world, values)

    def _open(self, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
        """DeepSpeed's engine around the module; without an optimizer the module itself may be called, its hooks are on it."""
        like = next(module.parameters())
        library = _library(self.world, like.device)
        config = engine_settings(self._found, is_bfloat16=like.dtype == torch.bfloat16)
        engine, *_ = library.initialize(model=module, optimizer=optimizer, config=config)
        self._engines.append((engine, {id(parameter) for parameter in module.parameters()}))
        return engine

    def _close(self, module: nn.Module) -> None:
        """Take the module back from an engine that has trained it: the hooks of that one would see every gradient still."""
        own = {id(parameter) for parameter in module.parameters()}
        for engine, its in self._engines:
            if own & its:
                engine.destroy()
                engine.optimizer = None  # or it does so again when it is collected, to parameters that are another's by then
        self._engines = [(engine, its) for engine, its in self._engines if not own & its]

    def _check(self, module: nn.Module) -> None:
        types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
        if len(types) > 1 or (types == ["bfloat16"] and self._stage == 1) or types == ["float64"]:
            raise ConfigError(
                f"model.dtype: weights are {' and '.join(types)} (a scalar head is float32), which ZeRO-{self._stage} does not "
                "train; it takes float32 alone, from stage 2 on also bfloat16 alone: set model.dtype=float32, or "
                "distributed.strategy=fsdp2"
            )


class ZeroModule:
    """TrainedModule in the hands of DeepSpeed's engine: all its parameters are trained, as one group."""

    def __init__(self, world: World, group: str, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._world, self._group, self._engine, self.optimizer = world, group, engine, optimizer
        self.module: nn.Module = engine
        self._named: dict[str, Parameter] = dict(engine.module.named_parameters())
        self.groups = {group: list(self._named.values())}
        self._is_active = False

    def zero_grad(self) -> None:
        """See TrainedModule."""
        zero = self._engine.optimizer
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = -1 if self._stage < 3 else 0  # of a step that was not taken; the first pass then starts anew
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = None

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See TrainedModule; DeepSpeed divides by the number of ranks, and so sums what is multiplied by it."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    @torch.no_grad()
    def clip(self, active: Sequence[str], max_norm: float) -> dict[str, float]:
        """See TrainedModule."""
        self._is_active = self._group in active
        if not self._is_active:
            return {}
        gradients = self._gradients()
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if norm > max_norm and math.isfinite(norm):  # nan would stay in the padding, which no pass overwrites
            for gradient in gradients:
                gradient.mul_(max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        return {self._group: norm}

    def step(self) -> None:
        """See TrainedModule."""
        if self._is_active:
            self._engine.step()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """See TrainedModule."""
        if self._stage < 3:
            yield from ((name, parameter.detach()) for name, parameter in self._named.items())
        else:
            yield from ((name, tensor) for _, name, tensor in ZeroWeights(("", *item) for item in self._named.items()))

    # ---- what a checkpoint needs

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """See TrainedModule; each is put together and cut into rows again, one at a time: every rank keeps its rows."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        mesh = new_mesh(self._flat[0].device.type, (self._world.size,))

        def rows(whole: Tensor) -> Tensor:
            parts = whole.chunk(self._world.size) if whole.dim() else ()
            mine = parts[self._world.rank] if self._world.rank < len(parts) else whole[:0]
            return DTensor.from_local(
                mine.clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )  # fmt: skip

        found = {f"parameter/{name}": rows(safe_get_full_fp32_param(parameter)) for name, parameter in self._named.items()}
        if self._has_state:
            step = self.optimizer.state[self._flat[0]]["step"]
            for name, parameter in self._named.items():
                found[f"optimizer/{name}/step"] = step
                for key in KEYS:
                    found[f"optimizer/{name}/{key}"] = rows(safe_get_full_optimizer_state(parameter, key))
        return found

    @torch.no_grad()
    def restore(self, fill: Fill, started: Collection[str]) -> None:
        """See TrainedModule."""
        assert not started or len(started) == len(self._named), "all parameters are one group: they start together"
        self._start(bool(started))
        tensors = self.state()
        fill(tensors)
        self.put_back({name.removeprefix("parameter/"): t for name, t in tensors.items() if name.startswith("parameter/")})
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            owner, _, key = rest.rpartition("/")
            if kind == "optimizer" and key in KEYS:
                self._assign(self._named[owner], _whole(tensor), key)
        for flat in self._flat[1:] if started else []:
            self.optimizer.state[flat]["step"].copy_(self.optimizer.state[self._flat[0]]["step"])

    @torch.no_grad()
    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """See TrainedModule."""
        from deepspeed import zero

        for name, parameter in self._named.items():
            whole = _whole(parameters[name])
            self._assign(parameter, whole, None)
            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(whole)

    def _assign(self, parameter: Parameter, whole: Tensor, key: str | None) -> None:
        """Overwrite this rank's part of a float32 weight, or of the optimizer's state of that name."""
        from deepspeed import utils

        if self._stage < 3 and key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        elif self._stage < 3:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        else:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.zeros(size * self._world.size, dtype=whole.dtype, device=whole.device)
            padded[: whole.numel()] = whole.flatten()
            mine = padded[self._world.rank * size :][:size]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, mine)
            else:
                utils.safe_set_local_optimizer_state(parameter, mine, key)

    def _start(self, started: bool) -> None:
        """Give the optimizer a state for every weight, by a step of rate 0 on gradients of zero, or none."""
        self.optimizer.state.clear()
        if not started:
            return
        (settings,) = self.optimizer.param_groups
        kept = settings["params"], settings["lr"]
        settings["lr"] = 0.0
        for flat in self._flat:
            settings["params"], flat.grad = [flat], torch.zeros_like(flat)
            self.optimizer.step()
            flat.grad = None
        settings["params"], settings["lr"] = kept
        if self._stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    # ---- DeepSpeed's insides

    @property
    def _stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's part of the float32 weights, as the optimizer has them."""
        zero = self._engine.optimizer
        return zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat

    @property
    def _has_state(self) -> bool:
        return self._flat[0] in self.optimizer.state

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the summed gradients, after the last pass."""
        zero = self._engine.optimizer
        if self._engine.zero_offload_optimizer() is not None:
            return [flat.grad for flat in self._flat if flat.grad is not None]
        return [gradient for number in sorted(zero.averaged_gradients) for gradient in zero.averaged_gradients[number]]


@contextmanager
def _without(module: nn.Module, trained: Iterable[Parameter]) -> Iterator[None]:
    """Leave out of the module, for the duration of the block, the submodules that have trained parameters of their own."""
    own = {id(parameter) for parameter in trained}
    taken = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if any(id(parameter) in own for parameter in child.parameters(recurse=False))
    ]
    for parent, name, _ in taken:
        parent._modules[name] = nn.Module()
    try:
        yield
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _library(world: World, device: torch.device) -> Any:
    """DeepSpeed, on our device, quiet, and so that it compiles nothing: gloo carries its collectives on a CPU."""
    tell_deepspeed(world, device.type)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # private: a test holds it to the pinned version
    return deepspeed
