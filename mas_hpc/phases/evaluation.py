"""Measuring a team beside its controls, and running it on questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from mas_hpc.config import SFTConfig
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.evaluation import benchmark
from mas_hpc.evaluation.metrics import VerdictBalance, noise_k
from mas_hpc.evaluation.team_metrics import print_team, summary
from mas_hpc.orchestration.demonstrate import plant
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.sampling import Sampling, derive_seed
from mas_hpc.orchestration.topology import Debate, Judged, Pipeline, Single
from mas_hpc.phases.accounting import print_account
from mas_hpc.phases.examples import build_demonstrator, training_tasks
from mas_hpc.rollouts import how_to_play, play_all, play_counted
from mas_hpc.run import Run
from mas_hpc.types import Task, Trace

BEFORE = "before.json"
"""Rows of the evaluation before training, in the run folder."""
MAX_SAMPLES = 64
"""Most episodes a question that the noise can ask for."""


def evaluate(run: Run, phase: str) -> list[benchmark.Row]:
    """The team and its controls on the held-out questions, at every temperature; phase before, after or "" (no training)."""
    settings = run.config.evaluation
    tasks = run.test_tasks[: settings.num_tasks]
    rows: list[benchmark.Row] = []
    for temperature in settings.temperatures:
        sampling = Sampling(temperature=temperature, top_p=run.config.rollout.top_p, top_k=run.config.rollout.top_k)
        label = f"{phase or 'evaluate'}-T{temperature:g}"
        played = play_counted(run, tasks, how_to_play(run, sampling, settings.seed), label=label)
        traces = played.traces
        balance = planted_verdicts(run, tasks, sampling)
        team = replace(
            benchmark.team_row(traces, phase=phase, temperature=temperature, verdicts=balance),
            repeated=repeated(run, tasks, sampling, traces), team=summary(traces, run.team.roles),
        )  # fmt: skip
        failed = sum(turn.finish == "error" for trace in traces for turn in trace.turns)
        run.console.print(
            f"evaluate: {team.name}, T={temperature:g}: {team.accuracy:.1%}" + (f", {failed} failed turns" if failed else ""),
            highlight=False,
        )
        rows.append(team)
        if not phase and run.world.is_first:
            print_team(run.console, team.team)
            print_account(run.console, played.account)
        if len(run.team.agents) > 1:
            rows.append(benchmark.first_speaker_row(traces, phase=phase, temperature=temperature))
        if settings.controls and temperature > 0:
            rows += controls(run, tasks, sampling, traces, team)
    return rows


def evaluate_before(run: Run) -> list[benchmark.Row]:
    """The rows before training; those that are kept in the folder where training has begun before. Collective."""
    file = run.folder / BEFORE
    has_begun = run.position is not None and run.position.phase == "train" and file.is_file()
    kept = gather_lines(run.world, [file.read_text(encoding="utf-8")] if has_begun and run.world.is_first else [])
    if kept:
        return [benchmark.Row.from_json(row) for row in json.loads(kept[0])]
    rows = evaluate(run, "before")
    if run.world.is_first:
        file.write_text(json.dumps([row.to_json() for row in rows]), encoding="utf-8")
    return rows


def repeated(run: Run, tasks: Sequence[Task], sampling: Sampling, traces: Sequence[Trace]) -> dict[str, float | None]:
    """avg@k, pass@k and maj@k over evaluation.samples episodes a question, or as many as the noise of the first asks for."""
    settings = run.config.evaluation
    accuracy = fmean(trace.reward or 0.0 for trace in traces)
    size = settings.samples or min(MAX_SAMPLES, noise_k([accuracy] * len(traces), len(traces)))
    if size < 2 or sampling.temperature == 0:
        return {}
    how = how_to_play(run, replace(sampling, episodes=size), settings.seed)
    played = play_all(run, tasks, how, label=f"avg@{size}", keep=False)
    return benchmark.repeated([played[start : start + size] for start in range(0, len(played), size)])


def planted_verdicts(run: Run, tasks: Sequence[Task], sampling: Sampling) -> dict[str, VerdictBalance]:
    """Each judging agent on answers that were planted, every other one wrong: a good team leaves it few wrong ones to judge."""
    method = run.config.warm_start or SFTConfig()
    demonstrator = build_demonstrator(run, method)
    seed = run.config.evaluation.seed
    found: dict[str, VerdictBalance] = {}
    for judge in (name for name, agent in run.team.agents.items() if agent.role.produces == "verdict"):
        planted = [
            plant(task, run.team, demonstrator, judge, right=number % 2 == 0, seed=derive_seed(seed, "plant", number))
            for number, task in enumerate(tasks)
        ]
        judged = [(task, start) for task, start in zip(tasks, planted, strict=True) if start]
        if judged:
            asked, starts = zip(*judged, strict=True)
            team = replace(run.team, topology=Judged(topology=run.team.topology, judge=judge))
            how = how_to_play(run, sampling, seed, team)
            traces = play_all(run, asked, how, label=f"{judge}-planted", starts=starts, keep=False)
            found |= {judge: benchmark.verdict_balance(traces)[judge]}
    return found


def controls(
    run: Run, tasks: Sequence[Task], sampling: Sampling, traces: Sequence[Trace], team: benchmark.Row
) -> list[benchmark.Row]:
    """Majority vote of the first agent, and its fresh tries judged by the first critic, at the team's tokens or more."""
    first = traces[0].path[0].agent
    critic = next((name for name, agent in run.team.agents.items() if agent.role.produces == "verdict"), None)
    rows = [vote(run, tasks, sampling, traces, team)]
    if any(len(trace.path) > 1 for trace in traces):
        rows.append(multi_turn(run, tasks, sampling, traces, team))
    if critic is not None:
        judged = replace(run.team, topology=Pipeline(agents=(first, critic)))
        made = best_of_n(run, tasks, sampling, judged, team.tokens_per_question)
        rows.append(benchmark.best_of_n_row(made, phase=team.phase, temperature=team.temperature))
    return rows


def vote(run: Run, tasks: Sequence[Task], sampling: Sampling, traces: Sequence[Trace], team: benchmark.Row) -> benchmark.Row:
    """Majority vote of as many samples of the team's first agent as it takes to cost the team's tokens or more."""
    alone = replace(run.team, topology=Single(agent=traces[0].path[0].agent))

    def measure(size: int) -> benchmark.Row:
        how = how_to_play(run, replace(sampling, group_size=size), run.config.evaluation.seed, alone)
        voted = play_all(run, tasks, how, label="vote", keep=False)
        return benchmark.vote_row(voted, phase=team.phase, temperature=team.temperature)

    return at_equal_tokens(measure, traces, team)


def multi_turn(
    run: Run, tasks: Sequence[Task], sampling: Sampling, traces: Sequence[Trace], team: benchmark.Row
) -> benchmark.Row:  # fmt: skip
    """The team's first agent alone, answering again and reading its own answers, for turns that cost the team's tokens."""
    first = traces[0].path[0].agent
    agents = dict(run.team.agents) | {first: replace(run.team.agents[first], sees="transcript")}

    def measure(size: int) -> benchmark.Row:
        alone = replace(run.team, agents=agents, topology=Debate(debaters=(first,), rounds=size))
        played = play_all(run, tasks, how_to_play(run, sampling, run.config.evaluation.seed, alone), label="turns", keep=False)
        return benchmark.multi_turn_row(played, phase=team.phase, temperature=team.temperature)

    return at_equal_tokens(measure, traces, team)


def at_equal_tokens(measure: Callable[[int], benchmark.Row], traces: Sequence[Trace], team: benchmark.Row) -> benchmark.Row:
    """The row of the smallest size that costs the team's tokens or more; or the last that cost more than the one before."""
    first = [len(trace.path[0].completion_ids) for trace in traces]
    size = benchmark.equal_budget(team.tokens_per_question, sum(first) / len(first))
    row = measure(size)
    while 0 < row.tokens_per_question < team.tokens_per_question:
        size += 1
        larger = measure(size)
        if larger.tokens_per_question <= row.tokens_per_question:
            break  # every further turn failed, as beyond the model's context
        row = larger
    return row


def best_of_n(run: Run, tasks: Sequence[Task], sampling: Sampling, judged: Team, budget: float) -> list[list[Trace]]:
    """Fresh tries until the critic accepts one; another round while the mean tokens a question are below `budget`."""
    made: list[list[Trace]] = [[] for _ in tasks]
    waiting = list(range(len(tasks)))
    while waiting and sum(trace.num_completion_tokens for tries in made for trace in tries) < budget * len(tasks):
        seed = derive_seed(run.config.evaluation.seed, "try", len(made[waiting[0]]))
        how = how_to_play(run, sampling, seed, judged)
        tries = play_all(run, [tasks[i] for i in waiting], how, label="best-of-n", keep=False)
        for i, trace in zip(waiting, tries, strict=True):
            made[i].append(trace)
        if not any(trace.num_completion_tokens for trace in tries):
            break  # every try failed: no round after it would spend a token either
        waiting = [i for i in waiting if made[i][-1].path[-1].verdict is not True]
    return made


def write_results(run: Run, rows: Sequence[benchmark.Row]) -> dict[str, Any]:
    """results.json: rows, and the paired tests of before against after."""
    results = {"rows": [row.to_json() for row in rows], "paired": benchmark.compare(rows)}
    if run.world.is_first:
        (run.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def rollout(run: Run) -> list[Trace]:
    """Run the team on held-out or training questions, one path each, and keep the traces."""
    settings = run.config.rollout
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
    tasks = (run.test_tasks if settings.split == "test" else training_tasks(run))[: settings.num_tasks]
    played = play_counted(run, tasks, how_to_play(run, sampling, run.config.seed), label="rollout")
    traces = played.traces
    right = sum(trace.reward or 0.0 for trace in traces)
    failed = sum(turn.finish == "error" for trace in traces for turn in trace.turns)
    run.console.print(
        f"{len(traces)} traces in {run.folder / 'traces'}: {right:g} right, {failed} failed turns", highlight=False
    )
    if run.world.is_first:
        print_team(run.console, summary(traces, run.team.roles))
        print_account(run.console, played.account)
    return traces
