"""A whole step on a number of nodes: its parts, what limits it, what to change, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mas_hpc.config import RunConfig
from mas_hpc.scaling.compute import trained_of
from mas_hpc.scaling.failures import Keeping, keeping_of
from mas_hpc.scaling.load import Lengths, Load, load_of
from mas_hpc.scaling.machine import Machine
from mas_hpc.scaling.memory import STATES, Memory, data_ranks, memory_of
from mas_hpc.scaling.rollout import Rollout, predict_rollout
from mas_hpc.scaling.shape import DTYPE_BYTES, ModelShape
from mas_hpc.scaling.training import Training, predict_training, sync_seconds

CONFIDENCE = 1.645
"""Standard deviations of the logarithm on either side of a band that holds nine of ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A step on so many nodes.

    Example: predict(question, nodes=256).seconds == 41.2
    """

    nodes: int
    ranks: int
    parts: dict[str, float]
    """Seconds: decode, tail, prefill, passes, collectives, optimizer, sync."""
    seconds: float
    """Their sum."""
    low: float
    high: float
    """Of the band that holds nine of ten."""
    idle: float
    """Part of the ranks that have nothing to do, for want of units."""
    memory: Memory
    fits: bool
    keeping: Keeping
    load: Load

    @property
    def limit(self) -> str:
        """The part that takes longest; no_units where ranks outnumber the units of work."""
        return "no_units" if self.idle > 0.5 else max(self.parts, key=lambda part: self.parts[part])

    @property
    def node_hours(self) -> float:
        """Of a step, with what checkpoints and faults cost."""
        return self.nodes * self.seconds / 3600 / max(1e-9, 1 - self.keeping.lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, but for the number of nodes.

    Example: Question(config=config, shape=shape_of(config.model), lengths=lengths, machine=machine, weak_from=0)
    """

    config: RunConfig
    shape: ModelShape
    lengths: Lengths
    machine: Machine
    weak_from: int = 0
    """Nodes that the configuration's batch is for, when the batch grows with the nodes; 0: it stays."""


def predict(question: Question, nodes: int) -> Prediction:
    """A step of method."""
    config, shape, machine = question.config, question.shape, question.machine
    ranks, trained = machine.ranks(nodes), trained_of(config, shape)
    data = data_ranks(config.distributed, ranks)
    load = load_of(config, question.lengths, nodes / question.weak_from if question.weak_from else 1.0)
    training = predict_training(config, load, shape, trained, machine, ranks)
    rollout = predict_rollout(
        load, question.lengths, shape, machine, ranks=ranks, max_rows=config.rollout.max_rows,
        size=DTYPE_BYTES[config.model.dtype],
        split=config.distributed.tensor_parallel if config.rollout.engine == "native" else 1,
    )  # fmt: skip
    parts = _parts(training, rollout, sync_seconds(config, shape, trained, machine, ranks))
    seconds = sum(parts.values())
    factor = math.exp(CONFIDENCE * machine.spread)
    most = min(config.model.max_tree_tokens, load.trained.tokens / load.units * math.ceil(load.units / data))
    memory = memory_of(config, shape, trained, ranks, most)
    kept = DTYPE_BYTES[config.model.dtype] * (
        (1 + STATES[config.method.optimizer]) * trained.parameters * (1 + load.extra_models)
    )  # fmt: skip
    return Prediction(
        nodes=nodes, ranks=ranks, parts=parts, seconds=seconds, low=seconds / factor, high=seconds * factor,
        idle=max(0.0, 1 - load.units / data), memory=memory,
        fits=memory.fits(machine.memory_bytes, machine.host_memory_bytes / machine.fabric.ranks_per_node),
        keeping=keeping_of(machine, nodes, kept), load=load,
    )  # fmt: skip


def _parts(training: Training, rollout: Rollout, sync: float) -> dict[str, float]:
    mean = max(0.0, rollout.mean_seconds - rollout.prefill_seconds)
    decode = min(mean, rollout.seconds - rollout.prefill_seconds)
    return {
        "decode": decode, "tail": rollout.seconds - rollout.prefill_seconds - decode, "prefill": rollout.prefill_seconds,
        "passes": training.passes, "collectives": training.collectives, "optimizer": training.optimizer, "sync": sync,
    }  # fmt: skip


def efficiency(predictions: Sequence[Prediction], prediction: Prediction) -> float:
    """Work a node-second, against the first of them."""
    first = predictions[0]
    per_node = prediction.load.units / prediction.seconds / prediction.nodes
    return per_node / (first.load.units / first.seconds / first.nodes)


ADVICE = {
    "decode": "reading weights and keys for every token: a smaller model.dtype, more rows at once (rollout.max_rows, kv_gib)",
    "tail": "the longest episodes: more tasks a step, a lower rollout.max_new_tokens, or fewer turns",
    "prefill": "prompts: shorter ones, or more siblings that share one (method.group_size)",
    "passes": "arithmetic: adapters in place of all weights, no activation checkpointing where memory allows, more nodes",
    "collectives": "the network: a larger share a rank (more tasks a step), distributed.shard_size of a few nodes, "
    "distributed.compute_dtype=bfloat16, or adapters",
    "optimizer": "the optimizer's memory: no distributed.offload, or a strategy that splits its states",
    "sync": "handing weights to engines: adapters, or ddp, which serves the trainer's own",
    "no_units": "more than half of the ranks have nothing to do: fewer nodes, or more tasks a step",
}  # fmt: skip
"""What to change, by what limits."""


def memory_advice(prediction: Prediction) -> str:
    """What to change where a tile is too small: the largest part decides."""
    memory = prediction.memory
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations", "gathered", "kv")}
    largest = max(parts, key=lambda name: parts[name])
    remedy = {
        "activations": "model.activation_checkpointing=true, or a lower model.max_tree_tokens",
        "kv": "a lower rollout.kv_gib",
        "gathered": "the whole copy for the engine is too large: adapters, or a smaller model",
    }.get(largest, "distributed.strategy=fsdp2, distributed.offload=true, or adapters")  # fmt: skip
    return f"{largest} takes {parts[largest] / 2**30:.3g} GiB of a tile: {remedy}"
