"""Small training runs that are stopped in the middle and go on, for tests of one process and of ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World
from mas_hpc.phases import training
from mas_hpc.phases.keeping import Keeper
from mas_hpc.resume import Training
from mas_hpc.run import build

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.hidden_size=32", "model.num_heads=2", "data.num_digits=3", "data.num_train=24", "data.num_test=6",
    "evaluation.num_tasks=6", "method.warmup_steps=1", "checkpoint.keep_last=9", "checkpoint.every=2",
)  # fmt: skip
WARM = ("warm_start.steps=3", "warm_start.batch_size=4")
METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("warm_start=null", "method.batch_size=4", "method.eval_every=2"),
    "dpo": (*WARM, "method.batch_size=4", "method.optimizer=adafactor"),
    "ppo": (
        *WARM, "method.tasks_per_step=4", "method.critic_warmup_steps=1", "method.minibatches=2", "method.kl.coefficient=0.05",
        "method.kl.place=reward", "method.kl.target=0.5", "method.kl.horizon=1000",
    ),
    "at_grpo": (
        *WARM, "adapters.policies=per_agent", "adapters.rank=2", "method.tasks_per_step=4", "method.group_size=2",
        "method.kl.coefficient=0.05", "method.kl.target=0.5", "method.kl.horizon=1000", "method.eval_every=2",
    ),
    "rm": (*WARM, "method.batch_size=4"),
    "grpo": (  # a longer warm start, so that some answers are right and the moving averages move
        "warm_start.steps=30", "warm_start.batch_size=16", "warm_start.learning_rate=0.01", "method.tasks_per_step=4",
        "method.group_size=4", "method.advantage=rae",
    ),
}  # fmt: skip
STEPS = 6
TIMES = ("time/", "memory/", "tokens_per_s", "mfu", "rollout/", "latency")
"""Beginnings of the names of what no two runs share."""


class Stopped(Exception):
    """What ends a run in the middle."""


def train(
    runs: Path, kind: str, *words: str, world: World | None = None, stop: tuple[str, int] | None = None, resume: bool = False,
    step: int | None = None, may_differ: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """`mas-hpc train` of a small run, named after the method unless `words` name it; what it said.

    With `stop` it ends after that step, counted from 0, of the phase.
    """
    overrides = [f"name={kind}", *SMALL, *METHODS[kind], f"method.steps={STEPS}", f"runs_dir={runs}", *words]
    config = load_config(ROOT / "configs" / f"{kind}.yaml", overrides)
    said, keep = io.StringIO(), Keeper.keep
    job = Training(job="train", step=step, may_differ=may_differ)
    console = Console(file=said, width=400)
    run = build(config, world or World(), console, runs / config.name if resume else None, training=job)

    def keep_and_stop(keeper: Keeper, number: int) -> None:
        keep(keeper, number)
        if stop == (keeper._phase, number):
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "keep", keep_and_stop)
        try:
            training.train(training.warm_up(run))
            assert stop is None, "it was not stopped"
        except Stopped:
            pass
        finally:
            run.close()
    return said.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the run has saved at its end."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for kind in ("model", "adapters")
        for file in sorted((folder / kind).rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    """All lines, without what is measured by a clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def traces(folder: Path) -> list[dict[str, Any]]:
    """All traces of training, without what is measured by a clock."""
    file = folder / "traces" / "train.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for trace in found:
        for turn in trace["turns"]:
            del turn["wall_s"]
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours and ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(one) == metrics(other)
    assert traces(one) == traces(other)


def assert_same_weights(one: Path, other: Path, *, tolerance: float) -> None:
    """Nearly: sums in another order."""
    close: Mapping[str, torch.Tensor] = weights(other)
    ours = weights(one)
    assert ours and ours.keys() == close.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, close[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
