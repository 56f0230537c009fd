"""Two ranks on two cores against one: the real `mas-hpc rollout`, colocated and sharded, by events and in waves.

SmolLM2-135M in float32 plays a four-agent pipeline on generated sums; completions end by themselves, so lengths vary. Episodes
a second of the phase itself (rollout/wall_s in metrics.jsonl): start-up and loading are left out. The machine must be quiet.
Run: python benchmarks/bench_ranks.py [ranks | schedules] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from reporting import ROOT, Row, report

TEAM = """
name: {name}
runs_dir: {runs}
model: {{path: smollm2}}
data: {{kind: reasoning_gym, name: chain_sum, num_train: 0, num_test: {tasks}}}
team:
  topology: pipeline
  agents:
    - {{name: solver, role: solver}}
    - {{name: critic, role: critic{second}}}
    - {{name: reviser, role: reviser}}
    - {{name: verifier, role: verifier{second}}}
{models}rollout: {{max_new_tokens: 32, max_rows: 16, num_tasks: {tasks}, placement: {placement}, schedule: {schedule}}}
method: {{kind: at_grpo}}
"""
TASKS = {"ranks": 96, "schedules": 32}
"""Episodes. Of ranks, six times what one decodes at once: the end, where rows are few, weighs little."""
Case = tuple[str, int, str, str, bool]  # name, ranks, placement, schedule, two models


def rollout(case: Case, tasks: int, folder: Path) -> float:
    """Episodes a second."""
    name, ranks, placement, schedule, two = case
    config = folder / "team.yaml"
    config.write_text(
        TEAM.format(
            name=name, runs=folder, tasks=tasks, placement=placement, schedule=schedule,
            second=", policy: second" if two else "", models="  models: {second: smollm2}\n" if two else "",
        )
    )  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words = [*(start if ranks > 1 else [sys.executable]), "-m", "mas_hpc", "rollout", str(config)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    newest = max(folder.glob(f"{name}*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    wall_s = next(line["rollout/wall_s"] for line in lines if "rollout/wall_s" in line)
    return tasks / wall_s


def measure(cases: Sequence[Case], tasks: int, repeats: int) -> Mapping[str, float]:
    """Mean episodes a second of each case, measured in turn."""
    found: dict[str, list[float]] = {case[0]: [] for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for case in cases:
                folder = Path(scratch) / str(repeat)
                folder.mkdir(exist_ok=True)
                found[case[0]].append(rollout(case, tasks, folder))
                print(f"{case[0]}: {found[case[0]][-1]:.3f} episodes/s", flush=True)
    return {name: mean(values) for name, values in found.items()}


def main() -> None:
    """Measure, write results/ranks.json or results/schedules.json, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=list(TASKS), default="ranks", help="two against one; or events, waves")
    parser.add_argument("--quick", action="store_true", help="a little of the work, once: to see that it runs")
    parser.add_argument("--repeats", type=int, default=2)
    words = parser.parse_args()
    tasks, repeats = (4, 1) if words.quick else (TASKS[words.what], words.repeats)
    events: list[Case] = [("colocated", 2, "colocated", "events", False), ("sharded", 2, "sharded", "events", True)]
    if words.what == "ranks":
        cases = [("one", 1, "colocated", "events", False), ("one-two-models", 1, "colocated", "events", True), *events]
    else:
        cases = [(f"{name}-waves", ranks, place, "waves", two) for name, ranks, place, _, two in events] + events
    found = measure(cases, tasks, repeats)

    def row(name: str, peer: str, what: str, target: float) -> Row:
        return Row(
            case=f"{tasks} episodes of 4 turns, {what}", metric="episodes/s", ours=found[name], peer=peer, theirs=found[peer],
            ratio=found[name] / found[peer], target=target,
        )  # fmt: skip

    rows = [
        row(name, peer, what, target)
        for name, peer, what, target in (
            ("colocated", "one", "two ranks, each with everything", 1.75),
            ("colocated", "colocated-waves", "events instead of waves", 1.0),
            ("sharded", "one-two-models", "two models on two ranks, against both on one", 1.5),
            ("sharded", "sharded-waves", "events instead of waves", 1.0),
        )
        if peer in found
    ]
    notes = {
        "model": "SmolLM2-135M-Instruct, float32, temperature 1, at most 32 tokens, 16 rows a rank",
        "runs": f"{repeats} of each, in turn; means",
    }
    report(f"{words.what}-quick" if words.quick else words.what, rows, notes=notes)


if __name__ == "__main__":
    main()
