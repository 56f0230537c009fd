"""The systems that bench_at_grpo compares, the order of its jobs, and each job as a command whose result stays on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from reporting import ROOT, commit

from mas_hpc.config_file import load_config

TASKS = {"ring": "quickstart.yaml", "shortest_path": "shortest_path.yaml", "mini_sudoku": "mini_sudoku.yaml"}
"""Configuration of each task, the most important first."""
OVER, UNDER = 0.02, 0.05
"""Shares of the budget by which a run may miss it; or by one step."""
GROUP_OF_EPISODES = ("method.kind=grpo", "method.tasks_per_step=16", "method.group_size=8", "method.learning_rate=4e-4")
"""Another kind clears the section, so these repeat what the configurations give AT-GRPO."""
Stage = Literal["warm", "train", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to train, from the warm start that all share.

    Example: System(label="AT-GRPO, credit loo", overrides=("method.credit.method=loo",))
    """

    label: str
    overrides: tuple[str, ...] | None = ()
    """Of the task's configuration; None: it is not trained."""
    is_main: bool = False
    """Also run on the tasks after the first before the rest is."""
    has_controls: bool = False
    """Its vote, best-of-n and first speaker are systems too."""
    is_single: bool = False
    """Trained as one agent, whose episodes all sample the same number of tokens."""
    needs_steps: bool = False
    """Its reward is a PRM, which learns from judged steps: only the ring has them."""


SYSTEMS = {
    "at_grpo": System(label="AT-GRPO", is_main=True, has_controls=True),
    "untrained": System(label="untrained team", overrides=None, is_main=True, has_controls=True),
    "per_agent": System(
        label="AT-GRPO, adapter per agent", overrides=("adapters.policies=per_agent", "method.learning_rate=2e-3"), is_main=True
    ),
    "agent_grpo": System(label="per-agent GRPO", overrides=(*GROUP_OF_EPISODES, "method.group_by=agent"), is_main=True),
    "single_grpo": System(
        label="single-agent GRPO", is_main=True, has_controls=True, is_single=True,
        overrides=(*GROUP_OF_EPISODES, "team.topology=single", "team.stop_when_accepted=false"),
    ),
    **{
        method: System(label=f"AT-GRPO, credit {method}", overrides=(f"method.credit.method={method}",))
        for method in ("outcome", "loo", "shapley", "first_error", "reward_blame")
    },
    "shapley_weight": System(
        label="AT-GRPO, weighted by masked shapley",
        overrides=("method.credit.method=shapley", "method.credit.form=weight", "method.credit.value=masked"),
    ),
    "process_reward": System(label="AT-GRPO, PRM's reward", needs_steps=True),
}  # fmt: skip
"""By folder name. AT-GRPO comes first: its sampled tokens are the budget of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to do for one task and seed.

    Example: Job(task="ring", seed=1, stage="train", system="loo")
    """

    task: str
    seed: int
    stage: Stage
    system: str = ""
    """Empty for the warm start."""

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}, {f'{self.stage} {self.system}' if self.system else 'warm start'}"


def waves(tasks: Sequence[str], seeds: Sequence[int], systems: Sequence[str]) -> list[list[list[Job]]]:
    """Chains of jobs in waves, what matters most first; the chains of a wave are independent of each other.

    All systems on the first task with three seeds; the main ones on the other tasks with two; then all the rest.
    """
    main = [name for name in systems if SYSTEMS[name].is_main]
    first = [chain(tasks[0], seed, systems) for seed in seeds[:3]]
    second = [chain(task, seed, main) for seed in seeds[:2] for task in tasks[1:]]
    queued = {job for jobs in (*first, *second) for job in jobs}
    rest = [[job for job in chain(task, seed, systems) if job not in queued] for seed in seeds for task in tasks]
    return [first, second, [jobs for jobs in rest if jobs]]


def chain(task: str, seed: int, systems: Sequence[str]) -> list[Job]:
    """The jobs of one task and seed in the order in which they need each other."""
    jobs = [Job(task=task, seed=seed, stage="warm")]
    for name in dict.fromkeys(("at_grpo", *systems)):
        if SYSTEMS[name].needs_steps and task != "ring":
            continue
        stages: tuple[Stage, ...] = ("evaluate",) if SYSTEMS[name].overrides is None else ("train", "evaluate")
        jobs += [Job(task=task, seed=seed, stage=stage, system=name) for stage in stages]
    return jobs


def equal_steps(budget: float, tokens_per_step: float) -> int:
    """Fewest steps that sample the budget."""
    return max(1, math.ceil(budget / tokens_per_step - 1e-9))


def is_equal(total: float, budget: float, tokens_per_step: float) -> bool:
    """Whether a run sampled the budget: 2% more or 5% less at most, or less than one step off."""
    return -max(UNDER * budget, tokens_per_step) < total - budget < max(OVER * budget, tokens_per_step)


def corrected_steps(totals: Mapping[int, float], budget: float) -> int:
    """The steps to try after those that sampled `totals`: between too few and too many, or else in proportion to the last.

    Longer training is not always that of a shorter one continued: a judge that starts to reject everything lengthens every
    episode, and the schedule of the learning rate decides when.
    """
    below, above = ([steps for steps, total in totals.items() if (total < budget) == is_below] for is_below in (True, False))
    if not below or not above:
        steps = list(totals)[-1]
        return equal_steps(budget, totals[steps] / steps)
    low, high = max(below), min(above)
    share = (budget - totals[low]) / (totals[high] - totals[low])
    return math.ceil(low + share * (high - low) - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where the jobs leave their results, and how long AT-GRPO trains.

    Example: Bench(folder=Path("runs/bench-at_grpo"), steps=40)
    """

    folder: Path
    steps: int
    """Of AT-GRPO; 0: those of the task's configuration."""

    def steps_of(self, task: str) -> int:
        """Steps of AT-GRPO on a task."""
        return self.steps or load_config(ROOT / "configs" / TASKS[task]).method.steps

    def base(self, task: str, seed: int) -> Path:
        """Folder of what does not depend on the number of steps."""
        return self.folder / f"{task}-{seed}"

    def trained(self, task: str, seed: int) -> Path:
        """Folder of what does."""
        return self.folder / f"{task}-{seed}-steps{self.steps_of(task)}"

    def record(self, job: Job) -> Path:
        """The file that says that a job is finished, and how it went."""
        if job.stage == "warm":
            return self.base(job.task, job.seed) / "warm.json"
        folder = self.base if SYSTEMS[job.system].overrides is None else self.trained
        return folder(job.task, job.seed) / (
            f"{job.system}-evaluated.json" if job.stage == "evaluate" else f"{job.system}.json"
        )

    def found(self, task: str, seed: int, system: str) -> dict[str, Any]:
        """The record of a finished training: steps, tokens (by step), cpu_s, commit."""
        return json.loads(self.record(Job(task=task, seed=seed, stage="train", system=system)).read_text())

    def perform(self, job: Job) -> None:
        """Do a job whose predecessors in its chain are finished."""
        if job.stage == "warm":
            self.command(job, "train", "warm", self.base(job.task, job.seed), "method.steps=0")
        elif job.stage == "evaluate":
            folder = self.record(job).parent
            self.command(job, "evaluate", f"{job.system}-evaluated", folder, *self.weights_after(job))
        else:
            chosen = self.train(job)
            self.record(job).write_text(
                json.dumps({**chosen, "tokens": sampled(self.trained(job.task, job.seed) / chosen["name"])})
            )

    def train(self, job: Job) -> dict[str, Any]:
        """Train a system on AT-GRPO's tokens, four times at most to find the steps; the record of the closest."""
        folder = self.trained(job.task, job.seed)
        if job.system == "at_grpo":
            return self.training(job, self.steps_of(job.task), folder)
        budget = sum(self.found(job.task, job.seed, "at_grpo")["tokens"])
        steps, totals = equal_steps(budget, self.expected_tokens_per_step(job)), {}
        while steps not in totals and len(totals) < 4:
            totals[steps] = sum(sampled(folder / self.training(job, steps, folder)["name"]))
            if is_equal(totals[steps], budget, totals[steps] / steps):
                break
            steps = corrected_steps(totals, budget)
        return self.training(job, min(totals, key=lambda tried: abs(totals[tried] - budget)), folder)

    def expected_tokens_per_step(self, job: Job) -> float:
        """From earlier seeds in proportion to AT-GRPO's; the first seed has two steps on trial, and AT-GRPO's later decline.

        A team that learns is accepted earlier and so samples less; a single agent's steps are all alike.
        """
        ours = self.found(job.task, job.seed, "at_grpo")["tokens"]
        folder, is_single = self.base(job.task, job.seed), SYSTEMS[job.system].is_single
        ratios = [] if is_single else self.earlier_ratios(job)
        if ratios:
            return fmean(ratios) * fmean(ours)
        trial = fmean(sampled(folder / self.training(job, 2, folder)["name"]))
        return trial if is_single else trial * fmean(ours) / fmean(ours[:2])

    def earlier_ratios(self, job: Job) -> list[float]:
        """Tokens a step of the system over AT-GRPO's, one for each seed of the task that is finished."""
        files = sorted(self.folder.glob(f"{job.task}-*-steps{self.steps_of(job.task)}/{job.system}.json"))
        pairs = [(file, file.with_name("at_grpo.json")) for file in files]
        return [fmean(json.loads(a.read_text())["tokens"]) / fmean(json.loads(b.read_text())["tokens"]) for a, b in pairs]

    def training(self, job: Job, steps: int, folder: Path) -> dict[str, Any]:
        """One training of so many steps from the warm start; its record."""
        overrides = SYSTEMS[job.system].overrides or ()
        if SYSTEMS[job.system].needs_steps:
            overrides = (*overrides, f"method.reward_model={self.reward_model(job)}")
        start = (f"model.path={self.base(job.task, job.seed)}/warm/model", "warm_start.steps=0", f"method.steps={steps}")
        return self.command(job, "train", f"{job.system}-{steps}", folder, *start, *overrides)

    def reward_model(self, job: Job) -> Path:
        """A PRM that was trained on the task with the job's seed."""
        folder = self.base(job.task, job.seed)
        self.command(job, "train", "prm", folder, config="prm.yaml")
        return folder / "prm" / "model"

    def weights_after(self, job: Job) -> tuple[str, ...]:
        """Overrides that load what was trained, and say which controls to run."""
        warm, system = self.base(job.task, job.seed) / "warm" / "model", SYSTEMS[job.system]
        rest = ("warm_start.steps=0", f"evaluation.controls={str(system.has_controls).lower()}")
        if system.overrides is None:
            return (f"model.path={warm}", *rest)
        run = self.trained(job.task, job.seed) / self.found(job.task, job.seed, job.system)["name"]
        if "adapters.policies=per_agent" in system.overrides:
            return (f"model.path={warm}", f"adapters.path={run}/adapters", "adapters.policies=per_agent", *rest)
        return (f"model.path={run}/model", *rest)

    def command(self, job: Job, verb: str, name: str, folder: Path, *overrides: str, config: str = "") -> dict[str, Any]:
        """Run one `mas-hpc` command unless it is finished; its record. Its output goes to a log file beside its folder."""
        record, log = folder / f"{name}.json", folder / f"{name}.log"
        if not record.exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            file = ROOT / "configs" / (config or TASKS[job.task])
            words = [verb, str(file), f"runs_dir={folder}", f"name={name}", f"seed={job.seed}", *overrides]
            head, start = commit(), time.monotonic()
            cpu_s = run_to_end([sys.executable, "-m", "mas_hpc", *words], log)
            known = {"name": name, "commit": head, "cpu_s": cpu_s, "wall_s": time.monotonic() - start, "words": words}
            record.write_text(json.dumps(known))
        return json.loads(record.read_text())


def run_to_end(words: Sequence[str], log: Path) -> float:
    """CPU seconds of one child on one thread; stops the benchmark, naming the log, if the child fails."""
    with log.open("w") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(words, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)  # of this child alone, whatever runs beside it
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with status {child.returncode}, see {log}")
    return usage.ru_utime + usage.ru_stime


def sampled(run: Path) -> list[float]:
    """Tokens that a training sampled in each step, replays included."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["tokens/sampled"] for line in lines if line["phase"] == "train"]
