"""Ranks whose model is read in parts: argv is a job, the folder of a model, and a folder for what comes of it.

peaks: <folder>/<rank>.json, the MiB by which the process has grown at most when training could begin, with parts and without.
resume: runs under <folder> that were stopped, and went on with what others of their kind, or of plain ddp, had kept.
tensor: the same of ranks that share layers; some go on with what one rank had kept, and leave something to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shutil import copytree

from rich.console import Console

from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World, connected
from mas_hpc.resume import Training
from mas_hpc.run import build
from mas_hpc.training.learner import Learner
from tests.phases.resuming import ROOT, train

FSDP2 = "distributed.strategy=fsdp2"
TENSOR = "distributed.tensor_parallel=2"
NOISE = "method.neftune_alpha=5"
STOP = ("train", 2)


def status(name: str) -> float:
    """MiB that Linux says of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def growth(world: World, model: str, folder: Path, *, in_parts: bool) -> float:
    words = [f"model.path={model}", f"runs_dir={folder}", FSDP2, "data.num_train=16", "data.num_test=4"]
    config = load_config(ROOT / "configs" / "sft.yaml", words)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = status("VmRSS")
    run = build(config, world, Console(quiet=True), training=Training(job="train") if in_parts else None)
    learner = Learner(run.network(), run.strategy, run.config.method)
    grown = status("VmHWM") - before
    assert len(learner.trained) > 1 and (run.source is not None) == in_parts
    run.close()
    return grown


def share_layers(world: World, path: str, folder: Path) -> None:
    for kind in ("sft", "at_grpo"):
        train(folder / "whole", kind, TENSOR, path, world=world)
        train(folder, kind, TENSOR, path, world=world, stop=STOP)
        train(folder, kind, TENSOR, path, world=world, resume=True)
    others = {"to_ddp": ((TENSOR,), ()), "from_fsdp2": ((FSDP2,), (TENSOR, FSDP2)), "from_ddp": ((NOISE,), (NOISE, TENSOR))}
    for name, (first, then) in others.items():
        train(folder, "sft", path, f"name={name}", *first, world=world, stop=STOP)
        if name == "from_ddp" and world.is_first:
            copytree(folder / name, folder / "from_ddp_alone")
        train(folder, "sft", path, f"name={name}", *then, world=world, resume=True)
    train(folder, "sft", TENSOR, path, "name=from_one", world=world, resume=True)
    train(folder, "sft", TENSOR, path, "name=to_one", world=world, stop=STOP)


def main() -> None:
    job, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    with connected(World.from_env()) as world:
        if job == "peaks":
            found = {name: growth(world, model, folder, in_parts=name == "parts") for name in ("parts", "whole")}
            (folder / f"{world.rank}.json").write_text(json.dumps(found))
            return
        path = f"model.path={model}"
        if job == "tensor":
            share_layers(world, path, folder)
            return
        said = train(folder / "whole", "sft", FSDP2, path, world=world)
        assert f"reads its part of the weights in {model}" in " ".join(said.split()), said
        train(folder, "sft", FSDP2, path, world=world, stop=STOP)
        train(folder, "sft", FSDP2, path, world=world, resume=True)
        train(folder, "sft", path, "name=from_ddp", world=world, stop=STOP)
        train(folder, "sft", FSDP2, path, "name=from_ddp", world=world, resume=True)


if __name__ == "__main__":
    main()
