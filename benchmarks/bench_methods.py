"""Every method on the embedded default over fresh seeds: its own held-out measure, before and after training.

Usage: mas-hpc bench methods, or python benchmarks/bench_methods.py --seeds 1 2 3. Finished runs in --folder are not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from reporting import ROOT, Row, report

MEASURES = {
    "sft": ("loss", 0.5),
    "rm": ("accuracy", 0.9),
    "prm": ("f1", 0.8),
    "dpo": ("rewards/accuracies", 0.9),
    "ppo": ("accuracy", 0.4),
    "grpo": ("accuracy", 0.4),
}
"""Held-out measure of each method, and what it has to reach: the loss at most, the others at least."""
NOTES = {
    "rows": "ours: after training, theirs: before, both on held-out data; the ratio is goal / loss for SFT, else value / goal",
    "ppo, grpo": "greedy accuracy of one solver, which cannot see the right first digit: its ceiling is about 0.5; the weights "
    "are the best of four looks at the same questions",
    "cpu_s": "user and system seconds of the whole command, warm start included; theirs is the promise of 120 s",
}


def main() -> None:
    """Run every method with every seed; write benchmarks/results/methods.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-methods")
    arguments = parser.parse_args()
    rows = [row for seed in arguments.seeds for method in MEASURES for row in measure(arguments.folder, method, seed)]
    report("methods", rows, notes=NOTES)


def measure(folder: Path, method: str, seed: int) -> list[Row]:
    """One run: its held-out measure and its CPU seconds."""
    name, config = f"{method}-{seed}", ROOT / "configs" / f"{method}.yaml"
    seconds_file = folder / f"{name}.json"
    if not seconds_file.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        before = cpu_seconds_of_children()
        words = ["train", str(config), f"runs_dir={folder}", f"name={name}", f"seed={seed}"]
        subprocess.run([sys.executable, "-m", "mas_hpc", *words], cwd=ROOT, check=True)
        seconds_file.write_text(json.dumps(cpu_seconds_of_children() - before))
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if line["phase"] == "train/held_out"]
    key, target = MEASURES[method]
    values = [look[key] for look in looks]
    ours = max(values) if method in ("ppo", "grpo") else values[-1]  # eval_every keeps the best
    ratio = target / ours if method == "sft" else ours / target
    seconds = json.loads(seconds_file.read_text())
    case = f"{method}, seed {seed}"
    return [
        Row(case=case, metric=f"held-out {key}", ours=ours, peer="before", theirs=values[0], ratio=ratio, target=1.0),
        Row(case=case, metric="cpu_s", ours=seconds, peer="the promise", theirs=120.0, ratio=120.0 / seconds, target=1.0),
    ]


def cpu_seconds_of_children() -> float:
    """CPU time of the finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
