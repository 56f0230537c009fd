"""Is a prediction right? mas-hpc calibrate on two ranks, then the step that mas-hpc scale predicts, beside the one measured.

The models that are trained differ in size and shape from the one that calibrate measures passes of; calibration and steps take
turns, so that drift of the machine hits both. The machine must be quiet.
Run: python benchmarks/bench_scale.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from reporting import ROOT, Row, report

ROUNDS, STEPS = 3, 5
TARGET = 1 / 1.15
"""The smaller over the larger of predicted and measured."""


def lines(rounds: int, steps: int) -> list[dict[str, float | str]]:
    """What the ranks print: a case, predicted and measured seconds."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*start, str(Path(__file__).with_name("scale_step.py")), str(rounds), str(steps)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Measure, write results/scale.json, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two steps, once: to see that it runs")
    quick = parser.parse_args().quick
    found = lines(1, 2) if quick else lines(ROUNDS, STEPS)
    rows = []
    for case in dict.fromkeys(str(line["case"]) for line in found):
        of_it = [line for line in found if line["case"] == case]
        predicted, measured = (median(float(line[key]) for line in of_it) for key in ("seconds", "measured"))
        rows.append(
            Row(
                case=case, metric="s/step", ours=predicted, peer="measured", theirs=measured,
                ratio=min(predicted, measured) / max(predicted, measured), target=TARGET,
            )
        )  # fmt: skip
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    notes = {
        "step": "pack, forward, backward, sum over ranks, clip, AdamW; float32, chains of 256 tokens, two ranks, gloo; medians",
        "ours": "predicted, from a calibration that was measured just before",
        "load averages of 1, 5, 15 minutes at the end": load,
        "single rounds": "; ".join(f"{line['case']}: {line['seconds']:.3f} for {line['measured']:.3f}" for line in found),
    }
    report("scale-quick" if quick else "scale", rows, notes=notes)


if __name__ == "__main__":
    main()
