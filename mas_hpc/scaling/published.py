"""Published measurements as data, and what the model says for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from mas_hpc.scaling.compute import Trained, training_flops
from mas_hpc.scaling.load import Pass
from mas_hpc.scaling.machine import Machine
from mas_hpc.scaling.network import Collective
from mas_hpc.scaling.shape import ModelShape, named_shape
from mas_hpc.scaling.training import tensor_cost

FILE = Path(__file__).parent / "published.yaml"
GATHERED_BYTES, REDUCED_BYTES = 2, 4
"""Of a weight, and of a gradient."""


class Record(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingPoint(Record):
    """A run."""

    nodes: int
    micro_batch: int = 1
    accumulate: int = 1
    tokens_per_s: float


class TrainingSeries(Record):
    """Runs of one model, alike but for their size."""

    name: str
    source: str
    shape: str
    stack: Literal["torch", "deepspeed"]
    fused_attention: bool = True
    """Whether scores stay in registers, and their masked half is left out."""
    sequence: int
    shard_nodes: int = 0
    """Nodes that share one copy of the weights; 0: all."""
    tensor_parallel: int = 1
    """Tiles that compute each layer together; a micro-batch is theirs."""
    secondary_nodes: int = 0
    """Nodes that a second copy is spread over, which all gathers of a step but the first go to; 0: there is none."""
    held_back: bool = False
    points: tuple[TrainingPoint, ...]


class CollectivePoint(Record):
    """A call, or calls, over so many bytes in all."""

    nodes: int
    collective: Collective
    num_bytes: float
    seconds: float


class CollectiveSeries(Record):
    """Of one program."""

    name: str
    source: str
    held_back: bool = False
    points: tuple[CollectivePoint, ...]


class NodesPoint(Record):
    """Something that all nodes do before the first step."""

    nodes: int
    seconds: float


class NodesSeries(Record):
    """Of one thing."""

    name: str
    source: str
    kind: Literal["initialize", "stage"]
    held_back: bool = False
    points: tuple[NodesPoint, ...]


class CheckpointPoint(Record):
    """One write or read."""

    num_bytes: float
    kind: Literal["write", "read"]
    seconds: float


class CheckpointSeries(Record):
    """Of one model."""

    name: str
    source: str
    held_back: bool = False
    points: tuple[CheckpointPoint, ...]


class NotModelled(Record):
    """What is known, and why no prediction is made for it."""

    what: str
    why: str


class Published(Record):
    """All that is in the file.

    Example: len(read_published().training[0].points) == 8
    """

    training: tuple[TrainingSeries, ...]
    collectives: tuple[CollectiveSeries, ...]
    nodes: tuple[NodesSeries, ...]
    checkpoints: tuple[CheckpointSeries, ...]
    not_modelled: tuple[NotModelled, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement, with what predicts it from parameters and the site's machine.

    Example: next(points(read_published())).measured == 2.231
    """

    series: str
    source: str
    case: str
    measured: float
    """Seconds."""
    fitted: bool
    """Whether the fit sees it; otherwise it is held back."""
    predict: Callable[[Mapping[str, float], Machine], float]
    """Seconds, from the parameters and the machine that they make."""
    group: Literal["step", "stage", "initialize", "checkpoint"]
    """Points of one group share parameters."""


def read_published() -> Published:
    """The points that are shipped."""
    return Published.model_validate(YAML(typ="safe", pure=True).load(FILE.read_text(encoding="utf-8")))


def points(published: Published) -> Iterator[Point]:
    """All of them, in the order of the file; of each series the first, third, ... are fitted."""
    yield from _steps(published)
    for calls in published.collectives:
        for number, call in enumerate(calls.points):
            yield Point(
                series=calls.name, source=calls.source, group="step", measured=call.seconds, fitted=_is_fitted(calls, number),
                case=f"{call.collective} of {call.num_bytes / 1e9:.2f} GB", predict=_call(call),
            )  # fmt: skip
    for things in published.nodes:
        for number, thing in enumerate(things.points):
            yield Point(
                series=things.name, source=things.source, group=things.kind, measured=thing.seconds,
                fitted=_is_fitted(things, number), case=f"{thing.nodes} nodes", predict=_line(things.kind, thing.nodes),
            )  # fmt: skip
    for files in published.checkpoints:
        for number, file in enumerate(files.points):
            yield Point(
                series=files.name, source=files.source, group="checkpoint", measured=file.seconds, case=file.kind,
                fitted=_is_fitted(files, number), predict=_file(file),
            )  # fmt: skip


def _steps(published: Published) -> Iterator[Point]:
    for series in published.training:
        shape = named_shape(series.shape)
        for number, run in enumerate(series.points):
            tokens = run.micro_batch * run.accumulate * series.sequence / series.tensor_parallel  # a tile
            yield Point(
                series=series.name, source=series.source, group="step", measured=tokens / run.tokens_per_s,
                case=f"{run.nodes} nodes, {run.accumulate} x {run.micro_batch} x {series.sequence} tokens",
                fitted=_is_fitted(series, number), predict=_step(series, run, shape),
            )  # fmt: skip


def _is_fitted(series: TrainingSeries | CollectiveSeries | NodesSeries | CheckpointSeries, number: int) -> bool:
    return not series.held_back and number % 2 == 0


def _step(
    series: TrainingSeries, run: TrainingPoint, shape: ModelShape
) -> Callable[[Mapping[str, float], Machine], float]:  # fmt: skip
    tokens = run.micro_batch * series.sequence
    trained = Trained(body=shape.body, head=shape.head, parameters=shape.parameters, checkpointing=True)
    pairs = tokens * series.sequence * (0.5 if series.fused_attention else 1.0)
    score_bytes = 2.0 * shape.layers * shape.heads * tokens * series.sequence
    flops = training_flops(shape, Pass(tokens=tokens, predictors=tokens, pairs=pairs, rows=tokens), trained)

    def predict(values: Mapping[str, float], machine: Machine) -> float:
        rate = machine.gemm_flops
        if series.stack == "deepspeed":
            rate *= values["gemm_share_deepspeed"] / values["gemm_share"]
        scores = 0.0 if series.fused_attention else values["score_passes"] * score_bytes / machine.memory_bytes_per_s
        ranks, per_node = machine.ranks(run.nodes), machine.fabric.ranks_per_node
        split = series.tensor_parallel
        shards = min(ranks, series.shard_nodes * per_node or ranks) // split
        units, fabric = shape.layers + 1, machine.fabric
        weights, gradients = (shape.parameters * size / units / split for size in (GATHERED_BYTES, REDUCED_BYTES))
        gathers = 2 * run.accumulate
        far = fabric.cost("all_gather", weights, shards, stride=split).times(units)
        near = fabric.cost("all_gather", weights, series.secondary_nodes * per_node).times(units)
        gathered = far + near.times(gathers - 1) if series.secondary_nodes else far.times(gathers)
        reduced = fabric.cost("reduce_scatter", gradients, shards, stride=split).times(units * run.accumulate)
        replicas = fabric.cost("all_reduce", gradients / shards, ranks // split // shards, stride=shards * split).times(units)
        joined = tensor_cost(fabric, shape, tokens, GATHERED_BYTES, split, checkpointing=True).times(run.accumulate)
        passes = run.accumulate * (flops / rate + scores) / split
        return (gathered + reduced + replicas).beside(passes) + joined.seconds

    return predict


def _call(call: CollectivePoint) -> Callable[[Mapping[str, float], Machine], float]:
    return lambda values, machine: machine.fabric.cost(call.collective, call.num_bytes, machine.ranks(call.nodes)).seconds


def _line(kind: str, nodes: int) -> Callable[[Mapping[str, float], Machine], float]:
    return lambda values, machine: values[f"{kind}_base_s"] + values[f"{kind}_node_s"] * nodes


def _file(file: CheckpointPoint) -> Callable[[Mapping[str, float], Machine], float]:
    return lambda values, machine: file.num_bytes / (values["write_gb_per_s"] * 1e9)
