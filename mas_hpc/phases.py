"""The phases of a run, in the order of the pipeline: warm start, rollout, evaluation, training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from mas_hpc.agents.template import CompactTemplate
from mas_hpc.config import ATGRPOConfig, RingConfig, SFTConfig
from mas_hpc.credit_assignment.assign import num_group_tokens, to_samples
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo, group_metrics
from mas_hpc.data import trace_store
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.evaluation import benchmark
from mas_hpc.evaluation.graders import grade
from mas_hpc.evaluation.metrics import VerdictBalance
from mas_hpc.orchestration.demonstrate import Demonstrator, demonstrate, plant
from mas_hpc.orchestration.demonstrators import ReferenceDemonstrator, RingDemonstrator
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.sampling import Sampling, derive_seed
from mas_hpc.orchestration.topology import Judged, Pipeline, Single
from mas_hpc.run import Run, how_to_play, play_all, with_adapters
from mas_hpc.training.checkpoint import save
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import loss_of
from mas_hpc.training.offline import fit_offline
from mas_hpc.training.online import fit_online
from mas_hpc.types import Sample, Task, Trace


def warm_up(run: Run) -> Run:
    """The warm start of the base model, then the adapters on top of it; each only if configured."""
    warm_start = run.config.warm_start
    if warm_start and warm_start.steps:
        fit_sft(run, warm_start, "warm_start")
    return with_adapters(run) if run.config.adapters.policies == "per_agent" else run


def build_learner(run: Run, method: SFTConfig | ATGRPOConfig) -> Learner:
    """The optimizer of one phase."""
    return Learner(
        run.model, run.bank, DataParallel(run.world), method, scope=run.config.adapters.scope,
        max_tree_tokens=run.config.model.max_tree_tokens,
        temperature=run.config.rollout.temperature if isinstance(method, ATGRPOConfig) else 1.0,
        updates_per_batch=method.updates_per_batch if isinstance(method, ATGRPOConfig) else 1,
    )  # fmt: skip


def train(run: Run) -> None:
    """Run the configured method and save the weights."""
    method = run.config.method
    if isinstance(method, SFTConfig):
        fit_sft(run, method, "train")
    else:
        fit_at_grpo(run, method)
    if run.world.is_first:
        warm_start = run.config.warm_start
        save(
            run.folder, run.model, run.tokenizer, run.bank, base_model=run.config.model.path,
            base_trained=warm_start is not None and warm_start.steps > 0,
        )  # fmt: skip


def fit_sft(run: Run, method: SFTConfig, phase: str) -> None:
    """Supervised fine-tuning on transcripts that a demonstrator writes for the training questions."""
    demonstrator = build_demonstrator(run, method)
    tasks = training_tasks(run)

    def batch(step: int) -> list[Sample]:
        rng = Random(derive_seed(run.config.seed, phase, step))
        chosen = rng.choices(tasks, k=method.batch_size)
        return [
            sample
            for number, task in enumerate(chosen)
            for sample in demonstrate(task, run.team, demonstrator, derive_seed(run.config.seed, phase, step, number))
        ]

    progress, advance = run.progress("supervised fine-tuning", method.steps)
    with progress:
        fit_offline(
            batch=batch, learner=build_learner(run, method), loss=loss_of(method),
            log=_logger(run, phase, method.steps, advance), steps=range(method.steps),
        )  # fmt: skip


def training_tasks(run: Run) -> tuple[Task, ...]:
    """The training questions. Raises DataError when there are none."""
    if not run.train_tasks:
        raise DataError("data.num_train=0: training needs questions; set data.num_train to at least 1")
    return run.train_tasks


def build_demonstrator(run: Run, method: SFTConfig) -> Demonstrator:
    """Who writes the transcripts: the ring's own demonstrator, or the reference solutions."""
    data = run.config.data
    if isinstance(data, RingConfig):
        return RingDemonstrator(modulus=data.modulus, slip_rate=method.slip_rate, wrong_rate=method.wrong_rate)
    return ReferenceDemonstrator(
        grade=grade, wrong_rate=method.wrong_rate, compact=isinstance(run.team.template, CompactTemplate)
    )


def fit_at_grpo(run: Run, method: ATGRPOConfig) -> None:
    """AT-GRPO: K siblings a state, credit inside each group, one or more updates a batch."""
    sampling = Sampling(
        temperature=run.config.rollout.temperature, group_size=method.group_size, commit=method.commit, alpha=method.alpha,
        team_rollouts=method.team_rollouts,
    )  # fmt: skip
    groups = GroupSettings(
        group_size=method.group_size, normalize=method.normalize, agent_weights=method.agent_weights,
        balance_verdicts=method.balance_verdicts,
    )  # fmt: skip
    if method.alpha and not method.team_rollouts and run.world.is_first:
        run.console.print(
            f"[yellow]method.alpha={method.alpha:g} with method.team_rollouts=0: siblings share one team reward, "
            "which group centring erases; only local rewards train. Set method.team_rollouts=1 or more.[/yellow]"
        )

    questions = training_tasks(run)
    if len(questions) < method.tasks_per_step:
        raise ConfigError(
            f"method.tasks_per_step={method.tasks_per_step}: there are {len(questions)} training questions; "
            f"set it to at most {len(questions)}, or raise data.num_train"
        )

    def collect_batch(step: int) -> list[Trace]:
        rng = Random(derive_seed(run.config.seed, "tasks", step))
        tasks = rng.sample(questions, k=method.tasks_per_step)
        how = how_to_play(run, sampling, derive_seed(run.config.seed, "train", step))
        return play_all(run, tasks, how, label="train", step=step, keep=False, bar=False)

    def credit(traces: Sequence[Trace]) -> tuple[list[Sample], int, Mapping[str, float]]:
        credited = at_grpo(traces, groups)
        if run.world.is_first:
            trace_store.write(run.folder / "traces" / "train.jsonl", credited)
        accuracy = sum(trace.reward or 0.0 for trace in credited) / len(credited)
        return to_samples(credited), num_group_tokens(credited), {"accuracy": accuracy, **group_metrics(credited)}

    progress, advance = run.progress("AT-GRPO", method.steps)
    with progress:
        fit_online(
            collect=collect_batch, credit=credit, learner=build_learner(run, method), loss=loss_of(method),
            push=lambda version: run.engine.load(version=version), steps=range(method.steps),
            log=_logger(run, "train", method.steps, advance), updates_per_batch=method.updates_per_batch,
        )  # fmt: skip


def _logger(run: Run, phase: str, steps: int, advance: Callable[[], None]) -> Callable[[int, Mapping[str, float]], None]:
    """Metrics to the log, and about ten lines of them to the console."""
    every = max(1, steps // 10)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        run.log(phase, step, metrics)
        advance()
        if run.world.is_first and ((step + 1) % every == 0 or step + 1 == steps):
            shown = [name for name in metrics if name in ("loss", "accuracy", "entropy") or name.startswith("reward/")]
            values = "  ".join(f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in shown)
            run.console.print(f"{phase} {step + 1}/{steps}  {values}", highlight=False)

    return log


def evaluate(run: Run, phase: str) -> list[benchmark.Row]:
    """The team and its controls on the held-out questions, at every temperature; phase before, after or "" (no training)."""
    settings = run.config.evaluation
    tasks = run.test_tasks[: settings.num_tasks]
    rows: list[benchmark.Row] = []
    for temperature in settings.temperatures:
        sampling = Sampling(temperature=temperature, top_p=run.config.rollout.top_p, top_k=run.config.rollout.top_k)
        traces = play_all(
            run, tasks, how_to_play(run, sampling, settings.seed), label=f"{phase or 'evaluate'}-T{temperature:g}"
        )
        balance = planted_verdicts(run, tasks, sampling)
        team = benchmark.team_row(traces, phase=phase, temperature=temperature, verdicts=balance)
        failed = sum(turn.finish == "error" for trace in traces for turn in trace.turns)
        run.console.print(
            f"evaluate: {team.name}, T={temperature:g}: {team.accuracy:.1%}" + (f", {failed} failed turns" if failed else ""),
            highlight=False,
        )
        rows.append(team)
        if len(run.team.agents) > 1:
            rows.append(benchmark.first_speaker_row(traces, phase=phase, temperature=temperature))
        if settings.controls and temperature > 0:
            rows += controls(run, tasks, sampling, traces, team)
    return rows


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
    if critic is not None:
        judged = replace(run.team, topology=Pipeline(agents=(first, critic)))
        made = best_of_n(run, tasks, sampling, judged, team.tokens_per_question)
        rows.append(benchmark.best_of_n_row(made, phase=team.phase, temperature=team.temperature))
    return rows


def vote(run: Run, tasks: Sequence[Task], sampling: Sampling, traces: Sequence[Trace], team: benchmark.Row) -> benchmark.Row:
    """Majority vote of as many samples of the team's first agent as it takes to cost the team's tokens or more."""
    first = [trace.path[0] for trace in traces]
    alone = replace(run.team, topology=Single(agent=first[0].agent))
    size = benchmark.equal_budget(team.tokens_per_question, sum(len(turn.completion_ids) for turn in first) / len(first))
    while True:
        how = how_to_play(run, replace(sampling, group_size=size), run.config.evaluation.seed, alone)
        voted = play_all(run, tasks, how, label="vote", keep=False)
        row = benchmark.vote_row(voted, phase=team.phase, temperature=team.temperature)
        if not 0 < row.tokens_per_question < team.tokens_per_question:
            return row
        size += 1


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
    """Run the team on the held-out questions, one path each, and keep the traces."""
    settings = run.config.rollout
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
    tasks = run.test_tasks[: settings.num_tasks]
    traces = play_all(run, tasks, how_to_play(run, sampling, run.config.seed), label="rollout")
    right = sum(trace.reward or 0.0 for trace in traces)
    failed = sum(turn.finish == "error" for trace in traces for turn in trace.turns)
    run.console.print(
        f"{len(traces)} traces in {run.folder / 'traces'}: {right:g} right, {failed} failed turns", highlight=False
    )
    return traces
