"""Seconds of a step's training by what takes them: passes, collectives, the optimizer; and of handing weights to engines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mas_hpc.config import RunConfig
from mas_hpc.config_methods import OnlineConfig
from mas_hpc.scaling.compute import Trained, forward_flops, training_flops
from mas_hpc.scaling.load import Load
from mas_hpc.scaling.machine import Machine
from mas_hpc.scaling.memory import compute_bytes, data_ranks, shards_of
from mas_hpc.scaling.network import NOTHING, Cost, Fabric
from mas_hpc.scaling.shape import DTYPE_BYTES, ModelShape

BUCKET_BYTES = 64 << 20
"""Gradients that one all-reduce of ddp takes."""
OPTIMIZER_PASSES = {"adamw": 7.0, "adafactor": 4.0}
"""Times that an optimizer reads or writes a number as large as a weight: weight, gradient and two moments, and three back."""

CLIP_PASSES, BUCKET_PASSES = 3.0, 2.0
"""Times that gradients are read or written to find their norm and be scaled, and to be laid into the buckets of ddp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Seconds of a step.

    Example: Training(passes=10.3, collectives=11.5, optimizer=0.02)
    """

    passes: float
    """Forward and backward, of the rank with most units."""
    collectives: float
    """Gathering weights and reducing gradients, as far as passes do not hide them; ddp reduces after them."""
    optimizer: float


def predict_training(
    config: RunConfig, load: Load, shape: ModelShape, trained: Trained, machine: Machine, ranks: int
) -> Training:  # fmt: skip
    """Of all updates of a step. Units are handed out whole, so that some ranks have one more than others."""
    rounds, split = load.updates, config.distributed.tensor_parallel
    data = data_ranks(config.distributed, ranks)
    part = load.trained.times(math.ceil(load.units * load.epochs / rounds / data) / load.units)
    forests = max(1, math.ceil(part.tokens / config.model.max_tree_tokens))
    models = 1 + load.extra_models
    flops = models * training_flops(shape, part, trained) + load.extra_forwards * forward_flops(shape, part)
    passes = flops / split / machine.gemm_flops
    joined = tensor_cost(machine.fabric, shape, part.tokens, compute_bytes(config), split, trained.checkpointing)
    hidden, after = collective_costs(config, shape, trained, machine, ranks, forests=forests)
    gathers = _gather(config, shape, machine, ranks).times(load.extra_forwards * forests)
    step = (hidden.times(models) + gathers).beside(passes) + models * (after + joined).seconds
    return Training(
        passes=rounds * passes, collectives=rounds * (step - passes),
        optimizer=rounds * models * optimizer_seconds(config, trained, machine, ranks),
    )  # fmt: skip


def collective_costs(
    config: RunConfig, shape: ModelShape, trained: Trained, machine: Machine, ranks: int, *, forests: int
) -> tuple[Cost, Cost]:  # fmt: skip
    """Of one update: (between the layers of passes, after them).

    Sharded weights are gathered in every forward and backward pass, and their gradients reduced in the last one.
    """
    settings, fabric = config.distributed, machine.fabric
    size, apart = DTYPE_BYTES[config.model.dtype], settings.tensor_parallel
    gradient_bytes = trained.parameters / apart * (4 if settings.compute_dtype == "bfloat16" else size)
    data = data_ranks(settings, ranks)
    shards = shards_of(settings, ranks)
    gathered = _gather(config, shape, machine, ranks).times(2 * forests)
    buckets = max(1, math.ceil(gradient_bytes / BUCKET_BYTES))
    if shards.optimizer == 1 or not trained.head:  # adapters are summed whole
        return gathered, fabric.cost("all_reduce", gradient_bytes / buckets, data, stride=apart).times(buckets)
    units = shape.layers + 1 if shards.weights > 1 else buckets
    reduced = fabric.cost("reduce_scatter", gradient_bytes / units, shards.optimizer, stride=apart)
    replicas = fabric.cost(  # HSDP: shards are summed over their replicas
        "all_reduce", gradient_bytes / units / shards.optimizer, data // shards.optimizer, stride=shards.optimizer * apart
    )
    after = NOTHING
    if shards.weights == 1:  # zero1, zero2: what each rank has stepped goes back to all
        after = fabric.cost("all_gather", shape.parameters * size / units, ranks).times(units)
    return gathered + (reduced + replicas).times(units), after


def _gather(config: RunConfig, shape: ModelShape, machine: Machine, ranks: int) -> Cost:
    """Of bringing every layer together once; nothing where a rank has them whole."""
    settings, units = config.distributed, shape.layers + 1
    num_bytes = shape.parameters * compute_bytes(config) / settings.tensor_parallel / units
    shards = shards_of(settings, ranks).weights
    return machine.fabric.cost("all_gather", num_bytes, shards, stride=settings.tensor_parallel).times(units)


def tensor_cost(fabric: Fabric, shape: ModelShape, tokens: float, size: int, split: int, checkpointing: bool) -> Cost:
    """Of layers that so many ranks compute together: sums of what attention and feed-forward give, forward and backward."""
    sums = shape.layers * (6 if checkpointing else 4)
    return fabric.cost("all_reduce", tokens * shape.width * size, split).times(sums)


def optimizer_seconds(config: RunConfig, trained: Trained, machine: Machine, ranks: int) -> float:
    """Clipping and the optimizer, bound by memory: the tile's, or where states are offloaded the link to the host's."""
    settings = config.distributed
    split = shards_of(settings, ranks).optimizer if trained.head else 1
    size = DTYPE_BYTES[config.model.dtype]
    rate = machine.host_bytes_per_s if settings.offload else machine.optimizer_bytes_per_s
    num_bytes = size * trained.parameters / split / settings.tensor_parallel
    flattened = BUCKET_PASSES if ranks > 1 and split == 1 else 0.0
    clipped = (CLIP_PASSES + flattened) * num_bytes / machine.memory_bytes_per_s
    return OPTIMIZER_PASSES[config.method.optimizer] * num_bytes / rate + clipped


def sync_seconds(config: RunConfig, shape: ModelShape, trained: Trained, machine: Machine, ranks: int) -> float:
    """Of bringing new weights to the engine of every rank.

    native serves the trainer's own weights where they are whole; sharded ones are gathered tensor by tensor, where ranks share
    layers from those with the same part, and adapters alone move where only they are trained. vllm has a copy of whole ones,
    which is written once more.
    """
    if not isinstance(config.method, OnlineConfig):
        return 0.0
    size = DTYPE_BYTES[config.model.dtype]
    num_bytes = float(trained.parameters * size)
    shards, apart = shards_of(config.distributed, ranks).weights, config.distributed.tensor_parallel
    tensors = 9 * shape.layers + 2
    native = config.rollout.engine == "native"
    served, parts, stride = (num_bytes / apart, shards, apart) if native else (num_bytes, min(ranks, shards * apart), 1)
    gather = machine.fabric.cost("all_gather", served / tensors, parts, stride=stride).times(tensors)
    gather = gather if trained.head else NOTHING
    copied = 2 * num_bytes / machine.memory_bytes_per_s if config.rollout.engine == "vllm" else 0.0
    return gather.seconds + copied
