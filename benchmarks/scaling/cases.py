"""What is run to see how ranks scale: ordinary jobs of mas-hpc on ordinary configurations, named after the case.

Whatever starts them, torchrun, mpiexec or `mas-hpc launch` on a cluster, their run folders say what is compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, cast

Kind = Literal["rollout", "train", "step"]
Mode = Literal["weak", "strong"]
PER_RANK = {"rollout": 256, "train": 64, "step": 32}
"""Questions, documents, and questions with eight answers each; strong scaling shares out those of the most ranks."""
STEPS = 5
"""Of which the first, which makes buffers and optimizer states, is left out."""
START = "warm-start"
"""One rank's run, whose model whole steps begin with: what several ranks warm up differs by rounding, which AdamW enlarges."""
_NAME = re.compile(r"(rollout|train|step)-(weak|strong)-(\d+)-(\w+)(?:-r(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run.

    Example: Case(kind="train", mode="weak", ranks=2, starter="torchrun").name == "train-weak-2-torchrun-r0"
    """

    kind: Kind
    mode: Mode
    ranks: int
    starter: str
    """torchrun, mpiexec, or the name of a site."""
    repeat: int = 0

    @property
    def name(self) -> str:
        """Of the run."""
        return f"{self.kind}-{self.mode}-{self.ranks}-{self.starter}-r{self.repeat}"

    @property
    def job(self) -> str:
        """mas-hpc's name for it."""
        return "rollout" if self.kind == "rollout" else "train"

    @property
    def config(self) -> str:
        """File in configs/."""
        return {"rollout": "quickstart.yaml", "train": "sft.yaml", "step": "grpo.yaml"}[self.kind]

    def overrides(self, *, most_ranks: int, runs: Path = Path("runs")) -> list[str]:
        """What the run changes of its configuration. most_ranks: of all runs that are compared; runs: the folder of START."""
        size = PER_RANK[self.kind] * (self.ranks if self.mode == "weak" else most_ranks)
        common = [f"name={self.name}", "evaluation.num_tasks=4"]
        if self.kind == "rollout":
            return [*common, "warm_start=null", "data.num_train=4", f"data.num_test={size}", f"rollout.num_tasks={size}"]
        if self.kind == "train":
            return [*common, f"method.steps={STEPS}", f"method.batch_size={size}"]
        start = ["warm_start=null", f"model.path={runs / START / 'model'}", "method.eval_every=0"]
        return [*common, *start, f"method.steps={STEPS}", f"method.tasks_per_step={size}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run folder says.

    Example: Found(case=case, seconds=0.41, grad_norms=(3.2, 3.1), traces={})
    """

    case: Case
    seconds: float
    """Of the phase (rollout), or the median of a step."""
    grad_norms: tuple[float, ...]
    """Of every step: the loss of a GRPO step is zero by centring, whatever was sampled."""
    traces: dict[str, list[list[int]]]
    """Sampled tokens of every episode of a rollout, by question."""


def read(folder: Path) -> Found | None:
    """The result of a run; None for a folder of another name. Raises ValueError where the run is not what it is named."""
    named = _NAME.fullmatch(folder.name)
    if not named:
        return None
    kind, mode, ranks, starter, repeat = named.groups()
    case = Case(
        kind=cast(Kind, kind), mode=cast(Mode, mode), ranks=int(ranks), starter=starter, repeat=int(repeat or 0)
    )  # fmt: skip
    beats = len(list((folder / "heartbeats").glob("rank_*.json")))
    if beats != case.ranks:
        raise ValueError(f"{folder}: {beats} ranks have left heartbeats, its name says {case.ranks}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if case.kind == "rollout":
        seconds = next(line["rollout/wall_s"] for line in lines if "rollout/wall_s" in line)
        return Found(case=case, seconds=seconds, grad_norms=(), traces=_tokens(folder))
    steps = [line for line in lines if line["phase"] == "train" and "time/step" in line]
    if len(steps) != STEPS:
        raise ValueError(f"{folder}: {len(steps)} steps in metrics.jsonl, expected {STEPS}")
    return Found(
        case=case, seconds=median(line["time/step"] for line in steps[1:]),
        grad_norms=tuple(line["grad_norm"] for line in steps), traces={},
    )  # fmt: skip


def _tokens(folder: Path) -> dict[str, list[list[int]]]:
    found = {}
    for file in (folder / "traces").glob("rollout*.jsonl"):
        for line in file.read_text().splitlines():
            trace = json.loads(line)
            found[trace["task"]["id"]] = [turn["completion_ids"] for turn in trace["turns"]]
    return found


def read_all(runs: Path) -> list[Found]:
    """Of every folder that is named after a case."""
    return [found for folder in sorted(runs.iterdir()) if folder.is_dir() and (found := read(folder))]


def start_overrides() -> list[str]:
    """What START changes of configs/grpo.yaml: after it, some answers are right and some are wrong."""
    few = [
        "warm_start.steps=150",
        "warm_start.batch_size=16",
        "method.eval_every=0",
        "method.steps=1",
        "method.tasks_per_step=4",
    ]
    return [f"name={START}", "evaluation.num_tasks=4", *few]


def launch_words(case: Case, *, most_ranks: int, nodes: int, options: Sequence[str]) -> list[str]:
    """The command that runs a case on a site, through its scheduler."""
    start = ["mas-hpc", "launch", f"configs/{case.config}", "--site", case.starter, "--nodes", f"{nodes}", "--job", case.job]
    return [*start, *case.overrides(most_ranks=most_ranks), *options]
