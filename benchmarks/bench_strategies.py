"""What sharding costs: an optimizer step of DDP, FSDP2 and ZeRO-1/2/3 on two ranks over one without anybody to talk to.

SmolLM2-135M in float32, two chains of 256 tokens a rank. The plain step is taken by two processes at once, which do not
know of each other and have half the batch each: both sides share the machine's memory and cores alike, and what is left
between them is communication. The ranks talk over gloo on one host. The machine must be quiet.
Run: python benchmarks/bench_strategies.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from reporting import ROOT, Row, report

STRATEGIES = {
    "ddp": 0.85,
    "fsdp2": 0.7,
    "zero1": 0.7,
    "zero2": 0.7,
    "zero3": 0.5,
}
"""Plain seconds over its seconds that a strategy is held to: 0.85 is an overhead of 18%."""
REPEATS = 3


def steps(num_steps: int) -> Mapping[str, float]:
    """Seconds a step by kind, of one start of the ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("strategy_step.py")
    words = [*start, str(script), ",".join(["plain", *STRATEGIES]), str(num_steps)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line) if line.startswith('{"') else {}
    print(found, flush=True)
    return found


def main() -> None:
    """Measure, write results/strategies.json, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two steps, once: to see that it runs")
    quick = parser.parse_args().quick
    runs = [steps(2 if quick else 8) for _ in range(1 if quick else REPEATS)]
    taken = {kind: median(run[kind] for run in runs) for kind in ("plain", *STRATEGIES)}
    rows = [
        Row(
            case=f"{kind} on two ranks, SmolLM2-135M, 2 x 256 tokens a rank", metric="s/step", ours=taken[kind],
            peer="plain step of half the batch", theirs=taken["plain"], ratio=taken["plain"] / taken[kind], target=target,
        )
        for kind, target in STRATEGIES.items()
    ]  # fmt: skip
    notes = {"step": "pack, forward, backward, sum over ranks, clip, AdamW; float32; the slower rank; median"}
    report("strategies-quick" if quick else "strategies", rows, notes=notes)


if __name__ == "__main__":
    main()
