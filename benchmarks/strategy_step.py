"""The optimizer step that bench_strategies times: ranks under torchrun, which print the median seconds of each kind of step.

Run: torchrun ... strategy_step.py <kind>,<kind>,... <steps>; kinds: plain, and the values of distributed.strategy
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch
import torch.distributed as dist

from mas_hpc.config import ModelConfig
from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.config_methods import SFTConfig
from mas_hpc.distributed.strategies import build_strategy
from mas_hpc.distributed.world import World, connected
from mas_hpc.models.load import load_model
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import offline_objective
from mas_hpc.training.network import Network
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample

LENGTH = 256
CHAINS_A_RANK = 2
VOCABULARY = 49152


def batch(num_chains: int) -> list[Sample]:
    """Chains of random tokens, all as long: what ranks wait for is each other's collectives, not each other's work."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (num_chains, LENGTH), generator=generator).tolist()
    return [
        Sample(
            id=str(number), tree=str(number), agent="a", policy="a", prompt_ids=tuple(row[:32]), prompt_spans=(("", 32),),
            completion_ids=tuple(row[32:]),
        )
        for number, row in enumerate(rows)
    ]  # fmt: skip


def measure(kind: str, world: World, steps: int) -> float:
    """Median seconds of a step, of the slower rank; the first one, which makes optimizer states, is left out."""
    alone = kind == "plain"
    model, _ = load_model(ModelConfig(path="smollm2"), seed=0)
    settings = DistributedConfig() if alone else DistributedConfig.model_validate({"strategy": kind})
    method = SFTConfig(steps=1000, learning_rate=1e-5)
    learner = Learner(Network(model=model), build_strategy(World() if alone else world, settings), method)
    samples = batch(CHAINS_A_RANK * (1 if alone else world.size))
    found = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        learner.update(samples, offline_objective(method), Totals.of(samples))
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        found.append(float(taken))
    return median(found[1:])


def main() -> None:
    kinds, steps = sys.argv[1].split(","), int(sys.argv[2])
    with connected(World.from_env()) as world:
        for kind in kinds:
            taken = measure(kind, world, steps)
            if world.is_first:
                print(json.dumps({kind: taken}), flush=True)


if __name__ == "__main__":
    main()
