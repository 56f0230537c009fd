"""Fault drill: one AT-GRPO run of two ranks under the supervisor, disturbed 20 times, against the same run undisturbed.

Ranks are killed and stopped, raise, meet a full disk, and die over a newest checkpoint that is cut in half or has a changed
byte. The run must end with the same weights, bit by bit, and with every trace once. Printed per kind of fault: the time until
the supervisor has decided what to do, and from there until the first training step is done again. The product knows nothing of
it: drill_rank.py plants the faults. Writes results/drill.json.
Run: python benchmarks/drill.py [--faults 20] [--with torchrun|mpiexec|both] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

from reporting import ROOT, Row, cost_row, report
from safetensors.torch import load_file
from torch.distributed import PrefixStore, TCPStore

from mas_hpc.data import trace_store
from mas_hpc.distributed import heartbeats
from mas_hpc.distributed.heartbeats import Heartbeat
from mas_hpc.distributed.watchdog import BEAT_S

KINDS = ("SIGKILL", "SIGSTOP", "exception", "full disk", "truncated", "corrupted")
STALL_S = 4.0
NOTICED_S = dict.fromkeys(KINDS, 2.0) | {"SIGSTOP": 2 * STALL_S + 2.0, "exception": 5.0, "full disk": 5.0}
"""Within which the supervisor is to notice. A rank takes a second or two to end by itself, and one more is given to see whether
its end is a consequence; a full disk is told by the next checkpoint."""
RESTART_FACTOR = 1.5
"""Times that the first step of an undisturbed run takes from its start: restarts also wait, and look at checkpoints."""
TIMEOUT_S = 3600.0
CONFIG = """
name: run
runs_dir: {folder}
model: {{hidden_size: 32, num_heads: 2}}
data: {{kind: ring, num_digits: 5, modulus: 4, num_train: 64, num_test: 8}}
rollout: {{max_new_tokens: 8, max_rows: 4, stall_s: {stall_s}}}
warm_start: {{steps: 20, batch_size: 16, learning_rate: 3e-3}}
method: {{kind: at_grpo, steps: {steps}, tasks_per_step: 4, group_size: 4, learning_rate: 4e-4}}
checkpoint: {{every: 1, keep_last: 2}}
distributed: {{hang_s: 120}}
"""
SUPERVISE = """
import json, sys, time
from pathlib import Path
from mas_hpc.distributed.supervisor import launch
from mas_hpc.distributed.supervisor_ranks import Launch
start_s, loaded_s = time.monotonic(), time.process_time()
code = launch(Launch(**json.loads(sys.argv[1])))
Path(sys.argv[2]).write_text(json.dumps((time.process_time() - loaded_s) / (time.monotonic() - start_s)))
sys.exit(code)
"""
OVERHEAD = 0.01
"""Of a core: what may be spent on watching."""
NUM_BEATS = 300
EXAMPLE = Heartbeat(
    rank=0, phase="train", step=7, count=310, beat=42, num_kept=7, stall_s=300.0, pid=0, host="node", time_s=1.78e9
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to a rank, once.

    Example: Fault(number=3, kind="SIGKILL", rank=1, step=8, delay=0.2)
    """

    number: int
    kind: str
    rank: int
    step: int
    """After so many training steps."""
    delay: float
    """And this part of a step's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run under the supervisor that has ended well.

    Example: Outcome(folder=Path("/tmp/x"), said=((1.78e9, "launch: ..."),), events=())
    """

    folder: Path
    said: tuple[tuple[float, str], ...]
    """Lines of the supervisor, with the Unix time at which they came."""
    events: tuple[Mapping[str, Any], ...]
    """What the ranks noted: faults and steps."""

    @property
    def restarts(self) -> list[float]:
        """When the supervisor had decided to start the ranks again."""
        return [time_s for time_s, line in self.said if "all ranks start again" in line]


def draw_faults(count: int, seed: int) -> tuple[Fault, ...]:
    """Every kind equally often, in random order, two steps apart, on random ranks, at random places of a step."""
    draw = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    draw.shuffle(kinds)
    return tuple(
        Fault(number=number, kind=kind, rank=draw.randrange(2), step=2 * number + 2, delay=draw.uniform(0.0, 1.0))
        for number, kind in enumerate(kinds)
    )


def plan_in(folder: Path, faults: Sequence[Fault], *, steps: int) -> tuple[Path, Path]:
    """The run's configuration, and the plan that drill_rank.py reads."""
    config, plan = folder / "config.yaml", folder / "plan.json"
    config.write_text(CONFIG.format(folder=folder, stall_s=STALL_S, steps=steps))
    plan.write_text(
        json.dumps({"folder": str(folder), "run": str(folder / "run"), "faults": [asdict(fault) for fault in faults]})
    )
    return config, plan


def run(folder: Path, starter: str, faults: Sequence[Fault], *, steps: int) -> Outcome:
    """One run from beginning to end, in `folder`."""
    folder.mkdir(parents=True)
    config, plan = plan_in(folder, faults, steps=steps)
    command = (sys.executable, str(ROOT / "benchmarks" / "drill_rank.py"), "train", str(config))
    what = json.dumps({"job": "train", "command": command, "ranks": 2, "max_restarts": 3, "starter": starter})
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    said: list[tuple[float, str]] = []
    with (folder / "stdout").open("w") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISE, what, str(folder / "cores")], stdout=output, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DRILL_PLAN": str(plan)},
        )  # fmt: skip
        assert supervisor.stderr
        reader = threading.Thread(target=_listen, args=(supervisor.stderr, said), daemon=True)
        reader.start()
        try:
            code = supervisor.wait(TIMEOUT_S)
        finally:
            supervisor.terminate()
            supervisor.wait()
            reader.join(10.0)
    (folder / "stderr").write_text("".join(f"{time_s:.2f} {line}" for time_s, line in said))
    if code:
        raise SystemExit(f"{starter}, {len(faults)} faults: the run ended with code {code}; see {folder}/stderr")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return Outcome(folder=folder, said=tuple(said), events=tuple(events))


def _listen(lines: IO[str], said: list[tuple[float, str]]) -> None:
    for line in lines:
        said.append((time.time(), line))


# ---- what came of it


def differences(ours: Outcome, undisturbed: Outcome) -> list[str]:
    """How the results of a disturbed run differ from the other's; empty when nothing does."""
    one, other = (load_file(outcome.folder / "run" / "model" / "model.safetensors") for outcome in (ours, undisturbed))
    found = [f"weights {name}" for name in one.keys() | other.keys() if not _equal(one, other, name)]
    if traces(ours) != traces(undisturbed):
        found.append(f"traces: {len(traces(ours))} turns, {len(traces(undisturbed))} undisturbed")
    if losses(ours) != losses(undisturbed):
        found.append(f"losses: {losses(ours)} against {losses(undisturbed)}")
    return found


def _equal(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return name in one and name in other and bool((one[name] == other[name]).all())


def traces(outcome: Outcome) -> list[tuple[int, str, tuple[int, ...]]]:
    """Step, name and tokens of every turn that was trained on, in the order of the file."""
    found = trace_store.read(outcome.folder / "run" / "traces" / "train.jsonl")
    return [(trace.step, turn.id, tuple(turn.completion_ids)) for trace in found for turn in trace.turns]


def losses(outcome: Outcome) -> list[tuple[int, float]]:
    """Step and loss of every training step in the metrics."""
    lines = [json.loads(line) for line in (outcome.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["phase"] == "train" and "loss" in line]


def times(outcome: Outcome) -> dict[str, list[tuple[float, float]]]:
    """By kind of fault: seconds until the supervisor had decided, and from there until a training step was done again."""
    found: dict[str, list[tuple[float, float]]] = {}
    steps = [event["time_s"] for event in outcome.events if event["event"] == "step" and event["rank"] == 0]
    for fault in (event for event in outcome.events if event["event"] == "fault"):
        decided_s = min((time_s for time_s in outcome.restarts if time_s > fault["time_s"]), default=None)
        again_s = min((time_s for time_s in steps if decided_s and time_s > decided_s), default=None)
        if decided_s and again_s:
            found.setdefault(fault["kind"], []).append((decided_s - fault["time_s"], again_s - decided_s))
    return found


def first_step_s(outcome: Outcome) -> float:
    """Seconds from the start of the ranks until their first training step was done."""
    return min(event["time_s"] for event in outcome.events if event["event"] == "step") - outcome.said[0][0]


# ---- rows


def beat_cores() -> float:
    """Part of a core that a rank's signs of life take at their usual pace."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        beat = replace(EXAMPLE, pid=os.getpid())
        start_s = time.process_time()  # with the threads of the store, which is hosted here
        for number in range(NUM_BEATS):
            PrefixStore("watch", store).add("moves", 1)
            heartbeats.say(store, replace(beat, beat=number))
            heartbeats.write(Path(folder), beat)
        return (time.process_time() - start_s) / NUM_BEATS / BEAT_S


def overhead_rows(undisturbed: Mapping[str, Outcome]) -> list[Row]:
    """What watching takes where nothing happens."""
    cores = {
        f"{starter}: supervisor of two ranks": json.loads((outcome.folder / "cores").read_text())
        for starter, outcome in undisturbed.items()
    }
    cores[f"signs of life of a rank, one in {BEAT_S:g} s"] = beat_cores()
    return [
        cost_row(case=case, metric="cores", ours=ours, peer="promised", theirs=OVERHEAD, target=1.0)
        for case, ours in cores.items()
    ]


def rows_of(starter: str, ours: Outcome, undisturbed: Outcome, num_faults: int) -> list[Row]:
    """What was promised beside what was measured; the first rows say whether the results are the same."""
    differing = differences(ours, undisturbed)
    for line in differing:
        print(f"{starter}: {line}")
    fired = sum(event["event"] == "fault" for event in ours.events)
    rows = [
        Row(
            case=f"{starter}: weights, traces and losses of an undisturbed run", metric="equal", ours=float(not differing),
            peer="promised", theirs=1.0, ratio=float(not differing), target=1.0,
        ),
        Row(
            case=f"{starter}: faults that happened", metric="count", ours=fired, peer="planned", theirs=num_faults,
            ratio=fired / num_faults, target=1.0,
        ),
    ]  # fmt: skip
    again_s = RESTART_FACTOR * first_step_s(undisturbed)
    for kind, pairs in sorted(times(ours).items()):
        noticed_s, resumed_s = (median(column) for column in zip(*pairs, strict=True))
        case = f"{starter}: {kind}, {len(pairs)} times"
        rows += [
            cost_row(case=case, metric="s to notice", ours=noticed_s, peer="promised", theirs=NOTICED_S[kind], target=1.0),
            cost_row(case=case, metric="s to resume", ours=resumed_s, peer="1.5 cold starts", theirs=again_s, target=1.0),
        ]  # fmt: skip
    return rows


def main() -> None:
    """Drill, write results/drill.json, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--with", dest="starters", choices=("torchrun", "mpiexec", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs there")
    words = parser.parse_args()
    starters = ("torchrun", "mpiexec") if words.starters == "both" else (words.starters,)
    faults, steps = draw_faults(words.faults, words.seed), 2 * words.faults + 6
    rows: list[Row] = []
    calm: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for starter in starters:
            folder = (words.folder or Path(scratch)) / starter
            calm[starter] = run(folder / "undisturbed", starter, (), steps=steps)
            disturbed = run(folder / "disturbed", starter, faults, steps=steps)
            rows += rows_of(starter, disturbed, calm[starter], len(faults))
        rows += overhead_rows(calm)
    notes = {
        "run": f"AT-GRPO of a two-layer model, {steps} steps, a checkpoint after each, two ranks, DDP, seed {words.seed}",
        "torchrun": "the supervisor's own processes, in torchrun's environment",
        "max_rows": "4, so one episode at a time: else the last digits of log-probs go by which rows a rank decodes together",
        "stall_s": f"{STALL_S:g}: a stopped rank is ended after twice that",
    }
    report("drill", rows, notes=notes)


if __name__ == "__main__":
    main()
