"""Planted faults: how well every credit method finds the truth, at an equal number of sampled completions a trace.

Usage: mas-hpc bench credit, or python benchmarks/bench_credit.py [--budget 64] [--steps 250]. Seeded; CPU only.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from coalition_tree import tree_rows
from credit_scores import (
    Found,
    gathered,
    mean_credit,
    names_agent,
    naming,
    rank_correlation,
    sign_accuracy,
    trivial,
    trivial_names,
)
from planted_cases import MAX_LIVE, NUM_TINY, NUM_TRACES, Case, corrupted, scripted, tiny, tiny_play, tiny_run
from planted_teams import TEAMS, build_tokenizer, exact_credit
from reporting import Row, cost_row, report
from rich.console import Console
from rich.table import Table

from mas_hpc.credit_assignment.credit import Credit, CreditMethod
from mas_hpc.credit_assignment.credit import Path as CreditPath
from mas_hpc.credit_assignment.error_localization import Fault, fault_by_scores
from mas_hpc.credit_assignment.message_rewards import MessageRewardSettings
from mas_hpc.orchestration.replay import ValueFunction
from mas_hpc.phases.replays import Game, play_games
from mas_hpc.types import Trace, Turn

NUM_PILOTS, PILOT_REPLAYS = 4, 6
"""Traces, right and failed, and replays that tell what a replay costs."""
MARGIN = 1.05
"""A method beats the trivial baselines when it is better by a twentieth."""
MAX_Z = 4.0
"""Of some twenty mean errors of an unbiased estimate one is above it once in a thousand runs."""
SCORES: tuple[CreditMethod, ...] = ("local", "outcome", "process_reward")
"""Rewards of messages that are no parts of a whole: an agent's are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A credit method as it is called here.

    Example: Method(name="shapley, masked", credit="shapley", value="masked")
    """

    name: str
    credit: CreditMethod
    value: ValueFunction = "removal"
    localizer: Literal["value", "checks", "prm"] = "value"
    """What finds the first error: values, executable checks of the text, or a process reward model."""

    def applies(self, case: Case) -> bool:
        """Whether the case has what the method needs."""
        if self.credit == "process_reward" or self.localizer == "prm":
            return case.score is not None
        return case.check is not None or self.localizer != "checks"

    def fault(self, case: Case, path: Sequence[Turn], scores: Sequence[float]) -> Fault | None:
        """What the localizer finds, if it is not values."""
        if self.localizer == "checks" and case.check:
            return case.check(path)
        return fault_by_scores(path, [(score,) for score in scores]) if self.localizer == "prm" else None


METHODS = (
    Method(name="outcome", credit="outcome"),
    Method(name="local", credit="local"),
    Method(name="process_reward, oracle PRM", credit="process_reward"),
    Method(name="loo, removal", credit="loo"),
    Method(name="loo, resample", credit="loo", value="resample"),
    Method(name="shapley, removal", credit="shapley"),
    Method(name="shapley, replacement", credit="shapley", value="replacement"),
    Method(name="shapley, masked", credit="shapley", value="masked"),
    Method(name="shapley, resample", credit="shapley", value="resample"),
    Method(name="first_error, values", credit="first_error"),
    Method(name="first_error, checks", credit="first_error", localizer="checks"),
    Method(name="first_error, oracle PRM", credit="first_error", localizer="prm"),
    Method(name="reward_blame", credit="reward_blame"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a method found in a case, and what it cost.

    Example: Measured(found=found, replays=9, sampled=63.5, asked=110.0)
    """

    found: tuple[Found, ...]
    """One a trace."""
    replays: int = 0
    sampled: float = 0.0
    """Completions a failed trace, with the shared tree."""
    asked: float = 0.0
    """Completions a failed trace if every replay sampled its own."""


Results = Mapping[str, Measured]
"""By name of the case."""


def main() -> None:
    """Measure, write benchmarks/results/credit.json, print the rows and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=64, help="sampled completions a trace")
    parser.add_argument("--steps", type=int, default=250, help="steps of the tiny model's warm start")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    cases = [*(scripted(planted, tokenizer) for planted in TEAMS), corrupted(tokenizer)]
    with tempfile.TemporaryDirectory() as folder:
        run = tiny_run(Path(folder), arguments.steps)
    cases += [tiny(run, culprit) for culprit in ("solver", "critic", "reviser")]
    results = {method.name: measure_all(method, cases, arguments.budget) for method in METHODS}
    results |= {name: trivially(name, cases) for name in trivial_names()}
    rows = [*score_rows(cases, results), *cost_rows(cases, results), *fidelity_rows(cases, results)]
    rows += tree_rows(run.engine, run.test_tasks[:NUM_TINY], tiny_play(run))
    seconds = time.process_time()
    rows.append(cost_row(case="all of this", metric="cpu_s", ours=seconds, peer="the promise", theirs=180.0, target=1.0))
    report("credit", rows, notes=notes(cases, results, arguments.budget, arguments.steps))
    Console(width=200).print(summary(cases, results))


# ---- measuring


def measure_all(method: Method, cases: Sequence[Case], budget: int) -> Results:
    """The method in every case that it applies to."""
    return {case.name: measure(method, case, budget) for case in cases if method.applies(case)}


def trivially(name: str, cases: Sequence[Case]) -> Results:
    """A trivial rule in every case."""
    return {
        case.name: Measured(found=tuple(trivial(name, trace.path, case.players) for trace in case.traces)) for case in cases
    }


def measure(method: Method, case: Case, budget: int) -> Measured:
    """The credit of all traces, with as many replays as the budget of sampled completions pays for, one at the least."""
    failed = [trace for trace in case.traces if trace.reward == 0.0]
    right = [trace for trace in case.traces if trace.reward == 1.0]
    pilots = [traces[:NUM_PILOTS] for traces in (failed, right) if traces]
    cost = max(credits_of(method, case, traces, PILOT_REPLAYS)[1]["sampled"] / len(traces) for traces in pilots)
    replays = max(1, round(PILOT_REPLAYS * budget / cost)) if cost else 1
    blamed, calls = credits_of(method, case, failed, replays)
    praised, _ = credits_of(method, case, right, replays)
    by_task = {trace.task.id: one for trace, one in zip([*failed, *right], [*blamed, *praised], strict=True)}
    found = tuple(found_by(method, case, trace, by_task[trace.task.id]) for trace in case.traces)
    sampled, asked = calls["sampled"] / len(failed), calls["asked"] / len(failed)
    return Measured(found=found, replays=replays, sampled=sampled, asked=asked)


def credits_of(method: Method, case: Case, traces: Sequence[Trace], replays: int) -> tuple[list[Credit], Counter[str]]:
    """Credit of traces as `mas-hpc credit` gives it, and the number of completions asked for and sampled."""
    calls: Counter[str] = Counter()
    steps = []
    for trace in traces:
        path = credit_path(method, case, trace, replays)
        game = Game(task=trace.task, path=path, how=case.how, value=method.value, num_replays=replays)
        steps.append((trace.task.id, game.credit(method.credit)))
    return play_games(case.engine, steps, max_live=MAX_LIVE, requests=calls), calls


def credit_path(method: Method, case: Case, trace: Trace, replays: int) -> CreditPath:
    """What the method knows before it asks."""
    path = trace.path
    scores = tuple(case.score(path, place) for place in range(len(path))) if case.score else ()
    return CreditPath(
        turns=path, players=case.players, outcome=trace.reward or 0.0, scores=scores,
        localized=method.localizer != "value", fault=method.fault(case, path, scores),
        settings=MessageRewardSettings(epsilon=max(0.15, 1.5 / replays)),
    )  # fmt: skip


def found_by(method: Method, case: Case, trace: Trace, credit: Credit) -> Found:
    """Credit of messages and agents."""
    agents = gathered(trace.path, case.players, credit.rewards, mean=method.credit in SCORES)
    return Found(messages=credit.rewards, agents=agents)


# ---- scoring: a score is a number of one case, or None where the case has no such truth


def right_signs(case: Case, measured: Measured) -> float | None:
    """Of the mean credit of the agents, against the analytic values."""
    return None if case.truth is None else sign_accuracy(mean_credit(measured.found[:NUM_TRACES]), case.truth)


def right_ranks(case: Case, measured: Measured) -> float | None:
    """Of the mean credit of the agents, against the analytic values."""
    return None if case.truth is None else rank_correlation(mean_credit(measured.found[:NUM_TRACES]), case.truth)


def culprit_named(case: Case, measured: Measured) -> float | None:
    """Share of the failed traces in which, of the agents that spoke, the one of least credit is the culprit."""
    if not case.culprits:
        return None
    entries = zip(case.traces, measured.found, case.culprits, strict=True)
    return fmean(
        names_agent(found, culprit, {turn.agent for turn in trace.path})
        for trace, found, culprit in entries
        if trace.reward == 0.0
    )


def message_named(case: Case, measured: Measured) -> float | None:
    """Share of the traces in which the message of least credit is the corrupted one."""
    if not case.places:
        return None
    return fmean(naming(found.messages, place) for found, place in zip(measured.found, case.places, strict=True))


Score = Callable[[Case, Measured], float | None]
POOLED: tuple[tuple[str, str, Score], ...] = (
    ("sign accuracy", "scripted", right_signs),
    ("rank correlation", "scripted", right_ranks),
    ("culprit agent", "scripted", culprit_named),
    ("culprit agent", "corrupted", culprit_named),
    ("corrupted message", "corrupted", message_named),
    ("culprit agent", "tiny", culprit_named),
)
"""Metric, kind of the cases that it is the mean of, and its value in one of them."""


def pooled(cases: Sequence[Case], results: Results, kind: str, score: Score) -> float | None:
    """Mean over the cases of a kind; None if the method was measured in none of them."""
    chosen = [case for case in cases if case.kind == kind and case.name in results]
    values = [value for case in chosen if (value := score(case, results[case.name])) is not None]
    return fmean(values) if values else None


def score_rows(cases: Sequence[Case], results: Mapping[str, Results]) -> list[Row]:
    """Every method against the best trivial rule of each metric, then fault by fault."""
    rows = []
    for metric, kind, score in POOLED:
        best = {name: pooled(cases, results[name], kind, score) or 0.0 for name in trivial_names()}
        peer = max(best, key=best.__getitem__)
        for method in METHODS:
            ours = pooled(cases, results[method.name], kind, score)
            if ours is not None:
                rows.append(against(f"{method.name}: {kind} teams", metric, ours, peer, best[peer]))
    return [*rows, *(row for method in METHODS for row in fault_rows(method, cases, results))]


def against(case: str, metric: str, ours: float, peer: str, theirs: float) -> Row:
    """Correlations are compared from -1 up, everything else from 0."""
    low = 1.0 if metric == "rank correlation" else 0.0
    return Row(
        case=case, metric=metric, ours=ours, peer=peer, theirs=theirs, ratio=(ours + low) / (theirs + low), target=MARGIN
    )  # fmt: skip


def fault_rows(method: Method, cases: Sequence[Case], results: Mapping[str, Results]) -> list[Row]:
    """One case each, against chance: naming for cases with a culprit, the order of the agents for those without."""
    rows = []
    for case in cases:
        if case.name in results[method.name]:
            metric, score = ("culprit agent", culprit_named) if case.culprits else ("rank correlation", right_ranks)
            ours, theirs = score(case, results[method.name][case.name]), score(case, results["everybody alike"][case.name])
            assert ours is not None and theirs is not None
            rows.append(against(f"{method.name}: {case.name}", metric, ours, "everybody alike", theirs))
    return rows


def cost_rows(cases: Sequence[Case], results: Mapping[str, Results]) -> list[Row]:
    """Completions a failed trace: sampled with the shared tree, and asked for without it."""
    rows = []
    for method in METHODS:
        for kind in ("scripted", "corrupted", "tiny"):
            found = results[method.name]
            chosen = [found[case.name] for case in cases if case.kind == kind and case.name in found]
            sampled = fmean(one.sampled for one in chosen) if chosen else 0.0
            if sampled:
                asked = fmean(one.asked for one in chosen)
                name, metric = f"{method.name}: {kind} teams", "model calls a failed trace"
                rows.append(cost_row(case=name, metric=metric, ours=sampled, peer="unshared", theirs=asked, target=1.0))
    return rows


# ---- estimates against their own closed form


def errors(case: Case, value: ValueFunction, measured: Measured) -> list[dict[str, float]]:
    """Estimated minus analytic credit under a value function, by agent, for every trace."""
    assert case.planted is not None
    truths = [exact_credit(case.planted, value, trace.path) for trace in case.traces]
    return [{a: found.agents[a] - truth[a] for a in truth} for found, truth in zip(measured.found, truths, strict=True)]


def largest_z(entries: Sequence[Mapping[str, float]]) -> float:
    """Largest mean error of an agent in standard errors."""
    columns = [[entry[agent] for entry in entries] for agent in entries[0]]
    return max(abs(fmean(column)) / (stdev(column) / math.sqrt(len(column)) or 1.0) for column in columns)


def fidelity_rows(cases: Sequence[Case], results: Mapping[str, Results]) -> list[Row]:
    """Shapley estimates are right on average, and closer to the analytic values than leave-one-out at equal cost."""
    teams = [case for case in cases if case.kind == "scripted"]
    rows = []
    for method in METHODS:
        if method.credit == "shapley":
            entries = [errors(case, method.value, results[method.name][case.name]) for case in teams]
            metric, z = "largest |z| of a mean error", max(map(largest_z, entries))
            rows.append(cost_row(case=method.name, metric=metric, ours=z, peer="chance", theirs=MAX_Z, target=1.0))
            for other in METHODS:
                if other.credit == "loo" and other.value == method.value:
                    others = [errors(case, other.value, results[other.name][case.name]) for case in teams]
                    ours, theirs, metric = fmean(map(rmse, entries)), fmean(map(rmse, others)), "rmse of a trace's phi"
                    rows.append(
                        cost_row(case=method.name, metric=metric, ours=ours, peer=other.name, theirs=theirs, target=1.0)
                    )
    return rows


def rmse(entries: Sequence[Mapping[str, float]]) -> float:
    """Over traces and agents."""
    return math.sqrt(fmean(error**2 for entry in entries for error in entry.values()))


# ---- saying it


def notes(cases: Sequence[Case], results: Mapping[str, Results], budget: int, steps: int) -> dict[str, str]:
    """How it was measured."""
    failed = ", ".join(f"{case.name} {sum(t.reward == 0.0 for t in case.traces)}/{len(case.traces)}" for case in cases)
    replays = {name: sorted({one.replays for one in found.values() if one.sampled}) for name, found in results.items()}
    return {
        "budget": f"about {budget} sampled completions a failed trace, and no more a right one; replays of a value that it "
        "pays for: " + "; ".join(f"{name} {found[0]} to {found[-1]}" for name, found in replays.items() if found),
        "truth": "who was planted; for scripted teams also Shapley values under removal, summed over their Markov chain. "
        "It is the yardstick of all, though replacement and resample answer other questions; z and rmse are against the closed "
        "form of the method's own value function",
        "sign, rank": f"of the agents' mean credit over {NUM_TRACES} traces a team; mean over the {len(TEAMS)} scripted teams",
        "culprit, message": f"least credit, ties shared out, agents that did not speak left out; over failed traces: {failed}",
        "trivial": "the best of " + ", ".join(trivial_names()) + " for each metric, chosen in hindsight",
        "holds": f"better than that by a factor of {MARGIN}; correlations are compared as 1 + rho",
        "oracle PRM": "knows the chance of success after every message of a scripted team: no trained model can know it better",
        "tiny": f"quickstart after {steps} warm-start steps; the culprit's answers get one digit moved, its verdicts turned",
    }  # fmt: skip


def summary(cases: Sequence[Case], results: Mapping[str, Results]) -> Table:
    """Methods and trivial rules as rows, faults as columns."""
    table = Table(title="credit: rho where nobody is at fault, else share of failed traces whose culprit is named")
    table.add_column("method", no_wrap=True)
    message = [case for case in cases if case.places]
    for heading in ("sign", "rho", *(case.name for case in cases), *(f"{case.name}: which" for case in message), "calls"):
        table.add_column(heading, justify="right")
    for name, found in results.items():
        scores = [pooled(cases, found, "scripted", score) for score in (right_signs, right_ranks)]
        for case in cases:
            score = culprit_named if case.culprits else right_ranks
            scores.append(score(case, found[case.name]) if case.name in found else None)
        scores += [message_named(case, found[case.name]) for case in message]
        calls = fmean(one.sampled for one in found.values())
        table.add_row(name, *("-" if score is None else f"{score:.2f}" for score in scores), f"{calls:.0f}")
    return table


if __name__ == "__main__":
    main()
