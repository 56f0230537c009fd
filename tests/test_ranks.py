"""Two real ranks take the same first step as one, for each kind of method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("model.hidden_size=32", "warm_start.steps=30", "warm_start.batch_size=4", "method.steps=1", "data.num_train=16",
         "data.num_test=4", "data.num_digits=3", "evaluation.num_tasks=4")  # fmt: skip
METHODS = {
    "rm": ("method.batch_size=6",),
    "dpo": ("method.batch_size=6",),
    "ppo": ("method.tasks_per_step=8", "method.critic_warmup_steps=0", "method.minibatches=1"),
    "at_grpo": (
        "method.tasks_per_step=8",
        "method.group_size=4",
        "method.eval_every=0",
        "method.credit.method=shapley",
        "method.credit.value=removal",
        "method.credit.form=weight",
    ),
    "grpo": ("method.tasks_per_step=8", "method.group_size=8", "method.kl.coefficient=0.1"),
}
MEASURED = ("phase", "rollout", "latency", "latency_p95", "time", "memory", "tokens_per_s", "mfu")
COUNTS = ("rollout/requests", "rollout/prompt_tokens", "rollout/decoded_tokens")
"""What is the same however the episodes are dealt out; how much is shared, and how fast it goes, is not."""
TRAIN_ALL = """
import json, sys
from rich.console import Console
from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World, connected
from mas_hpc.phases.training import train, warm_up
from mas_hpc.run import build
with connected(World.from_env()) as world:
    for config, overrides in json.loads(sys.argv[1]):
        train(warm_up(build(load_config(config, overrides), world, Console(quiet=True))))
"""


def first_step(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if line["phase"] == "train")
    return {name: value for name, value in found.items() if name in COUNTS or name.partition("/")[0] not in MEASURED}


@pytest.mark.slow
def test_two_ranks_take_the_same_first_step_as_one_with_every_method(tmp_path: Path) -> None:
    script = tmp_path / "train_all.py"
    script.write_text(TRAIN_ALL)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun)):
        jobs = [
            (str(ROOT / "configs" / f"{method}.yaml"), [*SMALL, *own, f"runs_dir={tmp_path / name}"])
            for method, own in METHODS.items()
        ]
        done = subprocess.run(
            [*launcher, str(script), json.dumps(jobs)], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for method in METHODS:
        one, two = (first_step(tmp_path / name / method) for name in ("one", "two"))
        assert one.keys() == two.keys()
        if method == "dpo":  # policy and reference are still equal: whether a margin of 0 is above 0 is rounding's to say
            del one["rewards/accuracies"]
        for key, value in one.items():
            assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (method, key)
        assert one["grad_norm"] > 0 and one["tokens"] > 0
