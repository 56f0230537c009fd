"""The same runs on the CPU and on a device that refuses the CPU's tensors: prints both losses. argv: folder for the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World
from mas_hpc.phases import training
from mas_hpc.run import build
from tests.foreign_device import DEVICE

SMALL = ("model.hidden_size=32", "data.num_train=8", "data.num_test=2", "warm_start.steps=2", "method.steps=2")
JOBS = {
    "dpo": ("method.batch_size=4",),
    "ppo": ("method.tasks_per_step=2", "method.eval_every=1", "evaluation.num_tasks=2"),
    "at_grpo": ("method.tasks_per_step=4", "method.kl.coefficient=0.1", "method.group_size=4", "adapters.policies=per_agent"),
}


def losses(name: str, folder: Path, device: torch.device) -> list[float]:
    """Of every step of a run."""
    config = load_config(Path("configs") / f"{name}.yaml", [f"runs_dir={folder / device.type}", *SMALL, *JOBS[name]])
    run = build(config, World(device=device), Console(quiet=True))
    assert run.model.device == device
    training.train(training.warm_up(run))
    run.close()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key.endswith("loss") or key.startswith("grad_norm")]


def tied_after_moving(model: PreTrainedModel, *args: object, move=PreTrainedModel.to) -> PreTrainedModel:
    """torch keeps parameters tied where it can change their data in place, which it cannot for a device in Python."""
    moved = move(model, *args)
    moved.tie_weights()
    return moved


if __name__ == "__main__":
    torch.set_num_threads(1)
    PreTrainedModel.to = tied_after_moving
    training._save = lambda run, network: None  # safetensors reads storages, which this device has not
    for job in JOBS:
        print(json.dumps([losses(job, Path(sys.argv[1]), device) for device in (torch.device("cpu"), DEVICE)]), flush=True)
