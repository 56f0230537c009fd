"""The demo's claim over fresh seeds, and solver-only GRPO at equal sampled tokens beside it.

Every seed: the quickstart pipeline, then GRPO of the solver alone (same warm start, same number of sampled tokens).
Usage: mas-hpc bench team, or python benchmarks/bench_team.py --seeds 1 2 3. Finished jobs in --folder are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from reporting import ROOT, Row, report

from mas_hpc.config_file import load_config
from mas_hpc.evaluation.metrics import paired_test

Rows = dict[str, dict[str, Any]]
CONFIG = ROOT / "configs" / "quickstart.yaml"


def main() -> None:
    """Run every seed, write benchmarks/results/team.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-team")
    arguments = parser.parse_args()
    seeds = arguments.seeds
    rows = [row for seed in seeds for row in one_seed(arguments.folder, seed)]
    rows.append(summary(rows))
    notes = {"config": CONFIG.name, "seeds": str(seeds), "solver-only steps": str(solver_only_steps())}
    report("team", rows, notes=notes)


def one_seed(folder: Path, seed: int) -> list[Row]:
    """The team's pipeline, and from the same warm start the solver trained alone, then run as a team too."""
    team = job(folder, "pipeline", f"team-{seed}", f"seed={seed}")
    job(folder, "train", f"warm-{seed}", f"seed={seed}", "method.steps=0")
    warm = (f"seed={seed}", f"model.path={folder}/warm-{seed}/model", "warm_start.steps=0")
    single = ("team.topology=single", "method.agent_weights={}", f"method.steps={solver_only_steps()}")
    alone = job(folder, "pipeline", f"solver-{seed}", *warm, *single)
    as_team = job(folder, "evaluate", f"mixed-{seed}", f"seed={seed}", f"model.path={folder}/solver-{seed}/model", warm[-1])
    return compare(seed, team, alone, as_team)


def solver_only_steps() -> int:
    """Steps in which the solver alone samples as many tokens as the team in its own."""
    config = load_config(CONFIG)
    length = config.data.num_digits  # type: ignore[union-attr]
    team_tokens = 4 * length + 2  # solver and reviser write n digits, critic and verifier n marks and a sign
    return math.ceil(config.method.steps * team_tokens / length)


def job(folder: Path, command: str, name: str, *overrides: str) -> Rows:
    """One command; its evaluation rows by name and temperature, empty when it evaluates nothing."""
    words = [command, str(CONFIG), f"runs_dir={folder}", f"name={name}", *overrides]
    if not (folder / name / "report.html").exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "mas_hpc", *words], cwd=ROOT, check=True)
    results = folder / name / "results.json"
    found = json.loads(results.read_text())["rows"] if results.exists() else []
    return {f"{row['name']}, T={row['temperature']:g}": row for row in found}


def compare(seed: int, team: Rows, alone: Rows, as_team: Rows) -> list[Row]:
    """The trained team against everything else; a ratio of 1 is no worse than the peer."""
    rows = []
    for t in ("T=0", "T=1"):
        peers = {
            "the team before training": team[f"team, before training, {t}"],
            "its own solver alone": team[f"solver alone, after, {t}"],
            "solver trained alone, equal sampled tokens": alone[f"team, after training, {t}"],
            "team of the model whose solver was trained alone": as_team[f"team, {t}"],
        }
        after = {key: row for key, row in team.items() if key.endswith(f"after, {t}")}
        for rows_of, suffix in ((after, ""), (as_team, ", solver trained alone")):
            for key, row in rows_of.items():
                if key.endswith(t) and key.startswith(("majority", "best")):
                    peers[row["name"].removesuffix(", after") + suffix] = row
        trained = team[f"team, after training, {t}"]
        rows += [accuracy_row(f"seed {seed}, {t}", trained, peer, row) for peer, row in peers.items()]
    return rows


def accuracy_row(case: str, ours: dict, peer: str, theirs: dict) -> Row:
    """Accuracy of the trained team against a peer, with the paired difference in the name of the case."""
    test = paired_test(theirs["right"], ours["right"])
    case = f"{case} [{100 * test.low:+.1f}, {100 * test.high:+.1f}] points"
    ratio = ours["accuracy"] / max(theirs["accuracy"], 1e-9)
    return Row(
        case=case, metric="accuracy", ours=ours["accuracy"], peer=peer, theirs=theirs["accuracy"], ratio=ratio, target=1.0
    )


def summary(rows: list[Row]) -> Row:
    """Mean over seeds of the greedy team, after against before."""
    greedy = [row for row in rows if "T=0" in row.case and row.peer == "the team before training"]
    ours, theirs = (statistics.mean(getattr(row, name) for row in greedy) for name in ("ours", "theirs"))
    return Row(
        case="mean over seeds, T=0",
        metric="accuracy",
        ours=ours,
        peer=greedy[0].peer,
        theirs=theirs,
        ratio=ours / theirs,
        target=1.0,
    )


if __name__ == "__main__":
    main()
