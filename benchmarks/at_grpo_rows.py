"""What bench_at_grpo found: every system beside AT-GRPO over seeds, with paired intervals, as rows and one table a task."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from at_grpo_jobs import SYSTEMS, Bench, Job, System, chain
from reporting import Row
from rich.table import Table

from mas_hpc.evaluation.metrics import PairedSeeds, paired_t

OURS = SYSTEMS["at_grpo"].label


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One system, or a control of it, on the held-out questions.

    Example: Measured(task="ring", seed=1, system="AT-GRPO", temperature=0.0, accuracy=0.51, tokens=24.5, training_tokens=131e3)
    """

    task: str
    seed: int
    system: str
    temperature: float
    accuracy: float
    tokens: float
    """Sampled to answer a question."""
    training_tokens: float
    """Sampled to train it, replays included; 0 for what was not trained."""


@dataclass(frozen=True, kw_only=True)
class SeedRow(Row):
    """AT-GRPO (ours) beside another system: means over the seeds that both have.

    Example: accuracies .5 and .7 against .4 and .5 are ours=.6, theirs=.45, difference=.15, half_width=.6353: undecided
    """

    task: str
    temperature: float
    seeds: tuple[int, ...]
    ours_by_seed: tuple[float, ...]
    theirs_by_seed: tuple[float, ...]
    difference: float
    half_width: float | None
    """Of the 95% Student-t interval of the difference; None with one seed."""
    p_value: float | None
    winner: str
    """Whose interval lies on its side of 0; undecided if it does not, or with one seed."""
    tokens_per_question: tuple[float, float]
    """Ours and theirs."""
    training_tokens: tuple[float, float]


def collected(bench: Bench, tasks: Sequence[str], seeds: Sequence[int], systems: Sequence[str]) -> list[Measured]:
    """Everything that is finished."""
    jobs = [job for task in tasks for seed in seeds for job in chain(task, seed, systems) if job.stage == "evaluate"]
    return [measured for job in jobs if bench.record(job).exists() for measured in evaluated(bench, job)]


def evaluated(bench: Bench, job: Job) -> list[Measured]:
    """The rows of one evaluation that are systems here."""
    system = SYSTEMS[job.system]
    trained = 0.0 if system.overrides is None else sum(bench.found(job.task, job.seed, job.system)["tokens"])
    rows = json.loads((bench.record(job).parent / f"{job.system}-evaluated" / "results.json").read_text())["rows"]
    named = [(name_of(row["name"], system), row) for row in rows]
    return [
        Measured(
            task=job.task, seed=job.seed, system=name, temperature=row["temperature"], accuracy=row["accuracy"],
            tokens=row["tokens_per_question"], training_tokens=trained,
        )
        for name, row in named if name
    ]  # fmt: skip


def name_of(row: str, system: System) -> str:
    """What a row of an evaluation is called here; empty for controls that are not compared.

    Numbers of samples go, since they differ between seeds. What was trained alone is the first speaker, not its team.
    """
    row = re.sub(r"\b(of|over) \d+", r"\1 n", row)
    if system.is_single:
        return {"team": f"{system.label}, run as a team", "solver alone": system.label}.get(row, f"{system.label}, {row}")
    if row == "team":
        return system.label
    return f"{system.label}, {row}" if system.has_controls else ""


def compared(measured: Sequence[Measured]) -> list[SeedRow]:
    """One row for every task, temperature and system but AT-GRPO."""
    groups: dict[tuple[str, float, str], dict[int, Measured]] = defaultdict(dict)
    for one in measured:
        groups[one.task, one.temperature, one.system][one.seed] = one
    rows = []
    for (task, temperature, system), theirs in sorted(groups.items(), key=lambda group: group[0][:2]):
        ours = groups.get((task, temperature, OURS), {})
        seeds = [seed for seed in sorted(theirs) if seed in ours]
        if system != OURS and seeds:
            rows.append(compare(system, [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]))
    return rows


def compare(system: str, ours: Sequence[Measured], theirs: Sequence[Measured]) -> SeedRow:
    """AT-GRPO beside one system on the same seeds, one a place."""
    test = paired_t([a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True)])
    task, temperature = ours[0].task, ours[0].temperature
    mean_ours, mean_theirs = (fmean(one.accuracy for one in side) for side in (ours, theirs))
    return SeedRow(
        case=f"{task}, T={temperature:g}, n={test.n}", metric="accuracy", ours=mean_ours, peer=system, theirs=mean_theirs,
        ratio=mean_ours / max(mean_theirs, 1e-9), target=1.0, task=task, temperature=temperature,
        seeds=tuple(one.seed for one in ours), ours_by_seed=tuple(one.accuracy for one in ours),
        theirs_by_seed=tuple(one.accuracy for one in theirs), difference=test.mean, half_width=test.half_width,
        p_value=test.p_value, winner=winner(test, system),
        tokens_per_question=(fmean(one.tokens for one in ours), fmean(one.tokens for one in theirs)),
        training_tokens=(fmean(one.training_tokens for one in ours), fmean(one.training_tokens for one in theirs)),
    )  # fmt: skip


def winner(test: PairedSeeds, system: str) -> str:
    """AT-GRPO, the system, or undecided."""
    if test.half_width is None or abs(test.mean) <= test.half_width:
        return "undecided"
    return OURS if test.mean > 0 else system


def table(task: str, rows: Sequence[SeedRow]) -> Table:
    """The rows of one task as they are printed, the strongest system of each temperature first."""
    title = f"{task}: accuracy in %, AT-GRPO minus the system [95% over seeds]; tokens of AT-GRPO / of the system"
    result = Table(
        "system", "T", "n", "AT-GRPO", "system", "difference", "tokens a question", "training tokens", "wins", title=title
    )
    for row in sorted((row for row in rows if row.task == task), key=lambda row: (row.temperature, -row.theirs)):
        result.add_row(
            row.peer, f"{row.temperature:g}", str(len(row.seeds)), f"{100 * row.ours:.1f}", f"{100 * row.theirs:.1f}",
            interval(row), "{:.1f} / {:.1f}".format(*row.tokens_per_question), "{:,.0f} / {:,.0f}".format(*row.training_tokens),
            row.winner,
        )  # fmt: skip
    return result


def interval(row: SeedRow) -> str:
    """The difference in points, with its interval if there is one."""
    mean = f"{100 * row.difference:+.1f}"
    if row.half_width is None:
        return f"{mean} (one seed)"
    return f"{mean} [{100 * (row.difference - row.half_width):+.1f}, {100 * (row.difference + row.half_width):+.1f}]"


def totals(bench: Bench, tasks: Sequence[str], seeds: Sequence[int], systems: Sequence[str]) -> dict[str, str]:
    """Of each task, the real training tokens, steps and CPU seconds of every system: means over its finished seeds."""
    found: dict[str, str] = {}
    for task in tasks:
        jobs = [
            job for seed in seeds for job in chain(task, seed, systems) if job.stage == "train" and bench.record(job).exists()
        ]
        names = list(dict.fromkeys(job.system for job in jobs))
        records = {name: [bench.found(task, job.seed, name) for job in jobs if job.system == name] for name in names}
        found[f"sampled to train, {task}"] = "; ".join(_total(SYSTEMS[name].label, records[name]) for name in names)
    return {task: text for task, text in found.items() if text}


def _total(label: str, records: Sequence[Mapping]) -> str:
    tokens = ", ".join(f"{sum(record['tokens']):,.0f}" for record in records)
    steps = ", ".join(str(len(record["tokens"])) for record in records)
    return f"{label}: {tokens} tokens in {steps} steps, {fmean(record['cpu_s'] for record in records):.0f} CPU s"


def commits(bench: Bench) -> str:
    """The commits that the jobs ran at; "+changes" where the tree differed from it."""
    records = [json.loads(file.read_text()) for file in bench.folder.glob("*/*.json")]
    found = {record["commit"].partition("+") for record in records if record.get("commit")}
    return ", ".join(sorted(head[:7] + plus + changes for head, plus, changes in found))
