"""Does training a team pay? AT-GRPO beside other training and untrained controls at equal sampled tokens, over seeds.

Every system starts from the same warm start of its seed, and samples as many tokens in training as AT-GRPO with its roles'
own rewards, replays included. Finished jobs in --folder are not run again, so a run that was killed goes on where it was.
Usage: mas-hpc bench at_grpo, or python benchmarks/bench_at_grpo.py --tasks ring --seeds 1 2 3 --steps 40.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from threading import Lock

from at_grpo_jobs import SYSTEMS, TASKS, Bench, Job, Stage, waves
from at_grpo_rows import collected, commits, compared, table, totals
from reporting import ROOT, report
from rich.console import Console

NOTES = {
    "tasks": "the ring is made for teams: its solver cannot see which first digit works, so alone it is right about half the "
    "time; on the other two a single agent could in principle solve every question",
    "ours": "AT-GRPO, shared policy, each role's own verifiable reward; means over the seeds that both systems have (n)",
    "difference": "AT-GRPO minus the system, paired by seed, 95% Student-t interval; a winner's interval excludes 0. Nothing "
    "is corrected for the number of rows, and with 2 or 3 seeds intervals are wide. All seeds share their held-out questions",
    "training": "same warm start, and as many sampled tokens as AT-GRPO's steps, replays included: 2% more or 5% less, or one "
    "step. The warm start's demonstrations and the PRM's labels (ring only: other tasks have no judged steps) are not counted. "
    "Equal tokens are neither equal steps nor equal CPU seconds: systems with replays make fewer steps",
    "controls": "majority vote of the first agent, best of n by the own critic, and the first agent reading its own answers "
    "(solver over n turns; no warm start or training has shown it that, so its low rows say nothing), at the tokens "
    "a question of the same weights' team or more; sampled, so at T=1 only",
    "credit": "replays=1; value resample, of each sibling's own path; shapley_weight: value masked, form weight",
    "settings": "learning rates are the configurations' for all systems but adapters (2e-3); none was tuned for this table",
}


def main() -> None:
    """Run what is not finished, write benchmarks/results/at_grpo.json from what is, and print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="beside at_grpo, the budget")
    parser.add_argument("--steps", type=int, default=0, help="of AT-GRPO; 0: those of each task's configuration")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-at_grpo")
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time, each on one thread")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is finished")
    parser.add_argument("--note", default="", help="what the results should say about this run")
    arguments = parser.parse_args()
    bench, chosen = (
        Bench(folder=arguments.folder.resolve(), steps=arguments.steps),
        (arguments.tasks, arguments.seeds, arguments.systems),
    )
    if not arguments.report_only:
        run(bench, waves(*chosen), arguments.processes)
    rows = compared(collected(bench, *chosen))
    steps = ", ".join(f"{task} {bench.steps_of(task)}" for task in arguments.tasks)
    run_notes = {"AT-GRPO steps": steps, **totals(bench, *chosen), "commits of the jobs": commits(bench)}
    report("at_grpo", rows, notes={**NOTES, **run_notes, **({"this run": arguments.note} if arguments.note else {})})
    for task in dict.fromkeys(row.task for row in rows):
        Console(width=180).print(table(task, rows))


def run(bench: Bench, order: Sequence[Sequence[Sequence[Job]]], processes: int) -> None:
    """All unfinished jobs, wave by wave, the chains of a wave side by side."""
    todo = [[[job for job in jobs if not bench.record(job).exists()] for jobs in wave] for wave in order]
    progress = Progress([job for wave in todo for jobs in wave for job in jobs], processes)

    def perform(jobs: Sequence[Job]) -> None:
        for job in jobs:
            progress.say(job)
            start = time.monotonic()
            bench.perform(job)
            progress.finish(job, time.monotonic() - start)

    with ThreadPoolExecutor(processes) as pool:
        for wave in todo:
            list(pool.map(perform, wave))


class Progress:
    """Which job of how many, and about how long the rest takes; chains report from their own threads."""

    def __init__(self, jobs: Sequence[Job], processes: int) -> None:
        self._left = Counter(job.stage for job in jobs)
        self._seconds: dict[Stage, list[float]] = defaultdict(list)
        self._total, self._started, self._processes, self._lock = len(jobs), 0, processes, Lock()

    def say(self, job: Job) -> None:
        """A job begins."""
        with self._lock:
            self._started += 1
            left = f", about {self.minutes_left():.0f} min left" if self._seconds else ""
            print(f"{time.strftime('%H:%M:%S')} job {self._started} of {self._total}{left}: {job}", flush=True)

    def finish(self, job: Job, seconds: float) -> None:
        """A job ended."""
        with self._lock:
            self._left[job.stage] -= 1
            self._seconds[job.stage].append(seconds)

    def minutes_left(self) -> float:
        """The jobs that are not finished at the mean time of their stage so far, or of all stages."""
        every = fmean(value for values in self._seconds.values() for value in values)
        rest = sum(
            number * (fmean(self._seconds[stage]) if self._seconds[stage] else every) for stage, number in self._left.items()
        )
        return rest / self._processes / 60


if __name__ == "__main__":
    main()
