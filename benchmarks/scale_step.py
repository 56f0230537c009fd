"""Ranks that bench_scale starts: each calibrates, then takes real steps; the first prints predictions beside measurements.

Run: torchrun ... scale_step.py <rounds> <steps>
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from mas_hpc.config import ModelConfig, RunConfig
from mas_hpc.config_team import AgentConfig
from mas_hpc.distributed.strategies import build_strategy
from mas_hpc.distributed.world import World, connected
from mas_hpc.launch.site import load_site
from mas_hpc.models.load import load_model
from mas_hpc.phases.calibrate import chains, measure
from mas_hpc.scaling.calibration import Calibration
from mas_hpc.scaling.load import Lengths
from mas_hpc.scaling.machine import machine_of
from mas_hpc.scaling.shape import shape_of
from mas_hpc.scaling.step import Question, predict
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import offline_objective
from mas_hpc.training.network import Network
from mas_hpc.training.share import Totals

LENGTH = 256


@dataclass(frozen=True)
class Case:
    """A model and a batch, none of which is what calibrate measures."""

    name: str
    model: ModelConfig
    rows: int


CASES = (
    Case("14 million weights, ddp, 8 chains", ModelConfig(hidden_size=448, num_layers=7, num_heads=7), 8),
    Case("SmolLM2-135M, ddp, 4 chains", ModelConfig(path="smollm2"), 4),
)


def config_of(case: Case) -> RunConfig:
    """What a user would write for such steps."""
    return RunConfig.model_validate(
        {
            "model": case.model, "team": {"topology": "single", "agents": (AgentConfig(name="a", role="solver"),)},
            "method": {"kind": "sft", "batch_size": case.rows, "learning_rate": 1e-5},
        }
    )  # fmt: skip


def predicted(case: Case, calibration: Calibration) -> dict[str, float]:
    """Seconds of a step by part."""
    config = config_of(case)
    prompt = LENGTH // 8
    lengths = Lengths(question=prompt, completion=LENGTH - prompt, sigma=0.0, limit=LENGTH, source="all alike")
    machine = machine_of(load_site("laptop"), calibration)
    question = Question(config=config, shape=shape_of(config.model), lengths=lengths, machine=machine)
    one = predict(question, 1)
    return {**one.parts, "seconds": one.seconds}


def measured(case: Case, world: World, steps: int) -> float:
    """Median seconds of a step, of the slower rank; the first one, which makes optimizer states, is left out."""
    config = config_of(case)
    model, _ = load_model(case.model, seed=0)
    learner = Learner(Network(model=model), build_strategy(world, config.distributed), config.method)
    samples = chains(case.rows, LENGTH)
    found = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        learner.update(samples, offline_objective(config.method), Totals.of(samples))
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        found.append(float(taken))
    return median(found[1:])


def main() -> None:
    rounds, steps = int(sys.argv[1]), int(sys.argv[2])
    with connected(World.from_env(), "cpu") as world:
        for _ in range(rounds):
            for case in CASES:
                calibration = measure(world)
                took = measured(case, world, steps)
                if world.is_first:
                    line = {"case": case.name, "measured": took, **predicted(case, calibration)}
                    print(json.dumps(line | {"pass_gflops": 1e3 * calibration.pass_tflops}), flush=True)


if __name__ == "__main__":
    main()
