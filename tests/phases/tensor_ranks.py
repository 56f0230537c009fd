"""Jobs of ranks that serve together; argv: the folder of a model, a folder for the runs, and names of JOBS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World, connected
from mas_hpc.phases import evaluation, training
from mas_hpc.phases.credit import CreditOptions, credit
from mas_hpc.run import build, reopen

ROOT = Path(__file__).parents[2]
PLAY = (
    "data.kind=ring", "data.num_digits=3", "data.num_train=8", "data.num_test=8", "rollout.num_tasks=8", "warm_start=null",
)  # fmt: skip
ADAPTERS = (
    "adapters.policies=per_agent", "adapters.rank=4", "adapters.target_modules=[q_proj, v_proj, o_proj, down_proj]",
    "team={topology: debate, rounds: 2, agents: [{name: ada}, {name: ben}]}",
)  # fmt: skip
TWO_MODELS = "team={topology: debate, agents: [{name: ada}, {name: ben, policy: other}], models: {other: MODEL}}"
CREDIT = (
    "method.steps=2", "method.tasks_per_step=4", "method.group_size=2", "method.credit={method: shapley}", "warm_start=null",
    "data.num_train=8", "data.num_test=4", "data.num_digits=3", "evaluation.num_tasks=4", "method.eval_every=2",
    "method.learning_rate=0.001",
)  # fmt: skip
JOBS = {
    "rollout": ("mas", *PLAY, *ADAPTERS),
    "crowded": ("mas", *PLAY, *ADAPTERS, "rollout.kv_gib=1.2e-5"),
    "models": ("mas", *PLAY, TWO_MODELS),
    "evaluate": ("mas", *PLAY, "evaluation.num_tasks=4", "evaluation.samples=2", "evaluation.temperatures=[1.0]"),
    "credit": ("at_grpo", *CREDIT),
}
"""Configuration and overrides. crowded: room for one or two of the questions at a time, so that prefixes go and come."""


def play(world: World, job: str, model: str, folder: Path, *words: str) -> None:
    """One job in <folder>/<job>, and credit for a rollout; what this rank held of the model is in held_<rank>.json there."""
    config, *own = JOBS[job]
    where = (f"runs_dir={folder}", f"name={job}", f"model.path={model}")
    settings = load_config(
        ROOT / "configs" / f"{config}.yaml", [*(word.replace("MODEL", model) for word in own), *where, *words]
    )
    run = build(settings, world, Console(quiet=True), trains=job == "credit")
    run = training.warm_up(run)
    if job == "credit":
        training.train(run)
    elif job == "evaluate":
        evaluation.write_results(run, evaluation.evaluate(run, ""))
    else:
        evaluation.rollout(run)
    models = [run.model, *run.other_models.values()]
    held = sum(parameter.nbytes for model in models for parameter in model.parameters() if not parameter.is_meta)
    found = {"bytes": held, "peak_kv": run.engine.stats.peak_kv_bytes, "evicted": run.engine.stats.evicted_tokens}
    (run.folder / f"held_{world.rank}.json").write_text(json.dumps(found))
    run.close()
    if job == "rollout":
        options = CreditOptions(method="shapley", value="masked", replays=1)
        credit(reopen(run.folder, world, Console(quiet=True)), options)


def main() -> None:
    model, folder, *jobs = sys.argv[1:]
    with connected(World.from_env()) as world:
        for job in jobs:
            play(world, job, model, Path(folder), "distributed.tensor_parallel=2")


if __name__ == "__main__":
    main()
