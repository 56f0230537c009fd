"""What the ranks of test_weight_sync.py do; each scenario's outcome on this rank goes to <folder>/<rank>.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mas_hpc.checksum import checksum
from mas_hpc.distributed.weight_source import HeldWeights
from mas_hpc.distributed.weight_sync import WeightSync, help_gather, open_sync
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import CheckpointError, MasHpcError, RolloutError
from mas_hpc.models.weights import assign_weights, named_weights

Weights = Iterable[tuple[str, str, Tensor]]
SENDER, RECEIVER = 0, 1
BLOCK_BYTES = 256
"""Several blocks for the small model below, and a ring that is used again and again."""


def model_of(seed: int) -> nn.Sequential:
    """Odd sizes, so that shards are uneven; 3.5 kB, of which the first tensor is the larger half."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(53, 8), nn.Linear(8, 7), nn.Linear(7, 5), *(nn.Linear(5, 5) for _ in range(12)))


def sums(model: nn.Module) -> str:
    return checksum(named_weights(model, None, ["base"]))


def open_one(
    world: World, transport: str, *, sender: int = SENDER, receiver: int = RECEIVER, timeout_s: float = 60
) -> WeightSync | None:
    return open_sync(
        world, sender=sender, receivers=[receiver], timeout_s=timeout_s, transport=transport, block_bytes=BLOCK_BYTES
    )  # fmt: skip


class Engine:
    """Loads into a model of its own; `spoil` says how it goes wrong."""

    def __init__(self, spoil: str = "") -> None:
        self.model, self.version, self.spoil, self.num_tensors = model_of(99), -1, spoil, 0

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        assert weights is not None
        self.version = version
        if self.spoil == "refuse":
            raise CheckpointError("no room for these weights")
        if self.spoil == "ignore":
            return ""
        return assign_weights(self.model, None, self._watched(weights))

    def _watched(self, weights: Weights) -> Iterator[tuple[str, str, Tensor]]:
        for policy, name, tensor in weights:
            self.num_tensors += 1
            if self.spoil == "flip" and name == "1.bias":
                tensor = tensor.clone()  # the view may be memory that other engines read too
                tensor.view(torch.uint8)[9] ^= 4
            yield policy, name, tensor


def one_push(sync: WeightSync | None, world: World, version: int, source: nn.Module, engine: Engine) -> str:
    """The checksum, or the error's message."""
    if sync is None:
        return ""
    try:
        if world.rank == SENDER:
            return sync.send(version=version, source=HeldWeights(named_weights(source, None, ["base"])))
        return sync.receive(engine.load)
    except MasHpcError as error:
        return f"{type(error).__name__}: {error}"


def pushes(world: World, transport: str) -> dict[str, object]:
    """Two full models and, between them, a single tensor; then every way in which an engine may go wrong, and a good push."""
    sync, engine = open_one(world, transport), Engine()
    found: dict[str, object] = {"first": one_push(sync, world, 1, model_of(1), engine)}
    found["held after first"] = sums(engine.model)
    engine.num_tensors = 0
    if world.rank == SENDER:
        assert sync is not None
        found["single"] = sync.send(version=2, source=HeldWeights([("base", "2.bias", torch.ones(5))]))
    elif sync is not None:
        found["single"] = sync.receive(engine.load)
        found["single tensors"] = engine.num_tensors
        found["single value"] = engine.model[2].bias.tolist()
    for spoil in ("flip", "refuse", "ignore", ""):
        engine.spoil = spoil
        found[spoil] = one_push(sync, world, 3, model_of(3), engine)
    found["held at the end"], found["version"] = sums(engine.model), engine.version
    if sync is not None:
        sync.close()
    return found


def two_engines(world: World, transport: str) -> dict[str, object]:
    """Rank 1 spoils the second of three pushes, rank 2 never does."""
    sync = open_sync(world, sender=0, receivers=[1, 2], timeout_s=60, transport=transport, block_bytes=BLOCK_BYTES)
    engine, found = Engine(), {}
    for version in (1, 2, 3):
        engine.spoil = "flip" if world.rank == 1 and version == 2 else ""
        found[str(version)] = one_push(sync, world, version, model_of(version), engine)
    assert sync is not None
    sync.close()
    return {**found, "held": sums(engine.model), "expected": sums(model_of(3))}


def sharded(world: World) -> dict[str, object]:
    """Ranks 0 and 1 hold an FSDP2 model in float32; rank 2 serves it in bfloat16."""
    sync = open_one(world, "shared", receiver=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)) if world.rank < 2 else None
    if mesh is None:
        model = model_of(0).bfloat16()
        assert sync is not None
        answer = sync.receive(lambda *, version, weights: assign_weights(model, None, weights))
        return {"answer": answer, "held": sums(model), "expected": sums(model_of(7).bfloat16())}
    model = model_of(7)
    for layer in (model[1], model):
        fully_shard(layer, mesh=mesh)
    rows = model[1].weight.to_local().shape[0]
    source = HeldWeights(named_weights(model, None, ["base"]), dtype=torch.bfloat16)
    if world.rank == SENDER:
        assert sync is not None
        answer = sync.send(version=1, source=source)
    else:
        help_gather(source)
        answer = ""
    beside = model_of(0)
    whole = assign_weights(beside, None, HeldWeights(named_weights(model, None, ["base"])))
    return {"answer": answer, "rows": rows, "whole": whole, "expected": sums(model_of(7))}


def absences(world: World, transport: str) -> dict[str, object]:
    """Ranks that never come, and one that stops while weights arrive; last of all, because gloo gives its connections up."""
    found: dict[str, object] = {}
    no_receiver = open_one(world, transport, timeout_s=0.5)
    no_sender = open_one(world, transport, timeout_s=0.5)
    stopping = open_one(world, transport, timeout_s=1.5)
    if world.rank == SENDER:
        found["no receiver"] = one_push(no_receiver, world, 5, model_of(1), Engine())
    if world.rank == RECEIVER:
        found["no sender"] = one_push(no_sender, world, 5, model_of(1), Engine())
    large = HeldWeights(("base", str(number), torch.zeros(2**19)) for number in range(3))
    try:
        if world.rank == SENDER:
            stopping.send(version=6, source=large)
        if world.rank == RECEIVER:
            stopping.receive(sleepy)
    except RolloutError as error:
        found["stopped"] = str(error)
    return found


def sleepy(*, version: int, weights: Weights | None = None) -> str:
    """An engine that stops for a while at the first tensor; the ring holds no second one."""
    for number, _ in enumerate(weights):
        if number == 0:
            time.sleep(4)
    return ""


def scenarios(world: World) -> dict[str, Callable[[], dict[str, object]]]:
    if world.launcher == "mpi":
        return {
            "window": lambda: pushes(world, "shared"),
            "mpi": lambda: pushes(world, "mpi"),
            "absences": lambda: absences(world, "mpi"),
        }
    return {
        "group": lambda: pushes(world, "group"),
        "file": lambda: pushes(world, "auto"),
        "two by group": lambda: two_engines(world, "group"),
        "two by file": lambda: two_engines(world, "shared"),
        "sharded": lambda: sharded(world),
        "absences": lambda: absences(world, "group"),
    }


def main() -> None:
    with connected(World.from_env()) as world:
        found = {name: run() for name, run in scenarios(world).items()}
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
