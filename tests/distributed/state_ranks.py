"""Two ranks that train a small module under every strategy, and go on from what another had; <folder>/<rank>.json.

Every value is the largest difference from plain data parallelism.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.strategies import build_strategy
from mas_hpc.distributed.strategy import Strategy, TrainedModule
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import ConfigError

STRATEGIES = ("fsdp2", "zero1", "zero2", "zero3")
MAX_NORM = 3.0
"""Above 1, which is what DeepSpeed would clip to, and below the norms of the steps."""


def start(strategy: Strategy) -> TrainedModule:
    """Rows of 7 and 5 do not divide by two ranks."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.LayerNorm(5))
    return strategy.train(
        module, {"shared": list(module.parameters())},
        lambda groups: torch.optim.AdamW([{"params": list(g)} for g in groups], lr=0.01, weight_decay=0.1, fused=True),
    )  # fmt: skip


def take(trained: TrainedModule, rank: int, step: int, *, weight: float = 1.0) -> dict[str, float]:
    """Two passes, and the gradients' norm before clipping; the step is not taken."""
    trained.zero_grad()
    for number in range(2):
        generator = torch.Generator().manual_seed(10 * step + 2 * number + rank)
        output = trained.module(torch.randn(8, 6, generator=generator))
        trained.backward(weight * output[:, :3].square().sum(), is_last=number == 1)
    return trained.clip(["shared"], MAX_NORM)


def run(trained: TrainedModule, rank: int, steps: range) -> list[float]:
    norms = []
    for step in steps:
        norms.append(take(trained, rank, step)["shared"])
        trained.step()
    return norms


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def apart(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def weights(trained: TrainedModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained.whole()}


def fill_from(saved: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """As a checkpoint does: every rank writes its part."""
    assert saved.keys() == tensors.keys(), saved.keys() ^ tensors.keys()
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            parts = saved[name].chunk(tensor.device_mesh.size())
            rank = tensor.device_mesh.get_rank()
            tensor.to_local().copy_(parts[rank] if rank < len(parts) else saved[name][:0])
        else:
            tensor.copy_(saved[name])


def compare(strategy: Strategy, rank: int, expected: TrainedModule, before: Mapping[str, Tensor]) -> dict[str, float]:
    """`expected` has taken three steps, and `before` is its state after two."""
    found: dict[str, float] = {}
    trained = start(strategy)
    found["state at the start"] = apart(whole(start_state(strategy)), whole(trained.state()))
    run(trained, rank, range(2))
    found["state after two steps"] = apart(before, whole(trained.state()))
    kept = {name: tensor.clone() for name, tensor in named(trained.state()).items()}
    take(trained, rank, 2, weight=float("nan"))  # skipped by whoever looks at the norm
    trained.zero_grad()
    trained.clip([], MAX_NORM)  # nobody has anything to learn from
    trained.step()
    found["weights after a skipped and an idle step"] = apart(named(before), weights(trained))
    run(trained, rank, range(2, 3))
    found["weights after three steps"] = apart(weights(expected), weights(trained))
    trained.put_back(kept)
    found["weights that were put back"] = apart(named(before), weights(trained))

    other = start(strategy)
    run(other, rank, range(7, 8))
    other.restore(lambda tensors: fill_from(before, tensors), list(named(before)))
    found["weights of another's checkpoint"] = apart(named(before), weights(other))
    run(other, rank, range(2, 3))
    found["weights after a step from another's checkpoint"] = apart(weights(expected), weights(other))
    return found


def start_state(strategy: Strategy) -> Mapping[str, Tensor]:
    alone = build_strategy(World(), DistributedConfig())
    return start(alone).state()


def named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("parameter/"): tensor for name, tensor in state.items() if name.startswith("parameter/")}


def refused(world: World, strategy: str) -> str:
    """What is said of Adafactor."""
    module = nn.Linear(6, 7)
    groups = {"shared": list(module.parameters())}
    settings = DistributedConfig.model_validate({"strategy": strategy})
    try:
        build_strategy(world, settings).train(module, groups, lambda g: torch.optim.Adafactor([{"params": list(p)} for p in g]))
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    with connected(World.from_env()) as world:
        expected = start(build_strategy(world, DistributedConfig()))
        norms = run(expected, world.rank, range(2))
        assert min(norms) > MAX_NORM, norms
        before = whole(expected.state())
        run(expected, world.rank, range(2, 3))
        found: dict[str, object] = {}
        for name in STRATEGIES:
            strategy = build_strategy(world, DistributedConfig.model_validate({"strategy": name}))
            found[name] = compare(strategy, world.rank, expected, before)
            found[f"{name} refuses"] = refused(world, name)
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
