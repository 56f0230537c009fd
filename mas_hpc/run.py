"""Composition root: builds the collaborators from a RunConfig and runs the phases. Nobody imports it but the face."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from ruamel.yaml import YAML

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import ChatTemplate, CompactTemplate
from mas_hpc.config import AdapterConfig, ATGRPOConfig, RingConfig, RunConfig, SFTConfig, TeamConfig
from mas_hpc.credit_assignment.assign import num_group_tokens, to_samples
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo, group_metrics
from mas_hpc.data import trace_store
from mas_hpc.data.tasks import load_tasks
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.evaluation import benchmark
from mas_hpc.evaluation.graders import grade
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.demonstrate import Demonstrator, demonstrate
from mas_hpc.orchestration.demonstrators import ReferenceDemonstrator, RingDemonstrator
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.sampling import Sampling, derive_seed
from mas_hpc.orchestration.topology import Pipeline, Single, Topology
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.training.checkpoint import save
from mas_hpc.training.learner import Learner
from mas_hpc.training.log import MetricsLog
from mas_hpc.training.methods import loss_of
from mas_hpc.training.offline import fit_offline
from mas_hpc.training.online import fit_online
from mas_hpc.types import Sample, Task, Trace


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the phases share."""

    config: RunConfig
    world: World
    folder: Path
    console: Console
    log: MetricsLog
    model: Any
    tokenizer: Any
    bank: AdapterBank | None
    engine: NativeEngine
    team: Team
    train_tasks: tuple[Task, ...]
    test_tasks: tuple[Task, ...]

    @property
    def judge(self) -> VerifiableJudge:
        """Ground truth for rewards."""
        method = self.config.method
        return VerifiableJudge(break_penalty=method.break_penalty if isinstance(method, ATGRPOConfig) else 0.0)

    def progress(self, title: str, total: int) -> tuple[Progress, Any]:
        """A progress bar that only the first rank shows."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=self.console, disable=not self.world.is_first, transient=True)
        return bar, bar.add_task(title, total=total)


def build(config: RunConfig, world: World, console: Console) -> Run:
    """Load tasks and model, make the run folder, write the resolved config. Raises ConfigError, DataError, CheckpointError."""
    check_world(config, world)
    train_tasks, test_tasks = load_tasks(config.data)
    torch.manual_seed(config.seed)
    with console.status(f"loading {config.model.path} ..."):
        model, tokenizer = load_model(config.model, seed=config.seed)
    team = build_team(config.team, config, tokenizer)
    folder = claim_folder(config.folder, world)
    if world.is_first:
        write_config(config, folder)
    return Run(
        config=config, world=world, folder=folder, console=console,
        log=MetricsLog(folder, is_writer=world.is_first, tracking=config.tracking),
        model=model, tokenizer=tokenizer, bank=None, engine=NativeEngine(model, tokenizer, max_rows=config.rollout.max_rows),
        team=team, train_tasks=train_tasks, test_tasks=test_tasks,
    )  # fmt: skip


def warm_up(run: Run) -> Run:
    """The warm start of the base model, then the adapters on top of it; each only if configured."""
    warm_start = run.config.warm_start
    if warm_start and warm_start.steps:
        fit_sft(run, warm_start, "warm_start")
    return with_adapters(run) if run.config.adapters.policies == "per_agent" else run


def check_world(config: RunConfig, world: World) -> None:
    """Refuse a number of ranks that the batch does not divide into."""
    method = config.method
    if isinstance(method, ATGRPOConfig) and method.tasks_per_step % world.size:
        below = method.tasks_per_step // world.size * world.size
        nearest = [size for size in (below, below + world.size) if size]
        raise ConfigError(
            f"method.tasks_per_step={method.tasks_per_step}: {world.size} ranks do not divide it; "
            f"nearest valid values are {' and '.join(map(str, nearest))}, or start another number of ranks"
        )


def claim_folder(wanted: Path, world: World) -> Path:
    """A folder of its own for this run: the wanted name, or the first free name-2, name-3, ...; all ranks agree."""
    chosen = ""
    if world.is_first:
        candidates = (wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 10_000)))
        folder = next(folder for folder in candidates if not folder.exists())
        folder.mkdir(parents=True)
        chosen = str(folder)
    return Path(gather_lines(world, [chosen] if chosen else [])[0])


def write_config(config: RunConfig, folder: Path) -> None:
    """The resolved config, every knob included, as YAML."""
    with (folder / "config.yaml").open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(config.model_dump(mode="json"), stream)


def build_team(settings: TeamConfig, config: RunConfig, tokenizer: Any) -> Team:
    """Agents, topology and the dialect of the model."""
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else CompactTemplate(tokenizer)
    agents = {
        agent.name: Agent(
            name=agent.name, role=ROLES[agent.role], sees=agent.sees, prompt=agent.prompt,
            policy=agent.name if config.adapters.policies == "per_agent" else "shared",
            max_new_tokens=agent.max_new_tokens or config.rollout.max_new_tokens,
        )
        for agent in settings.agents
    }  # fmt: skip
    return Team(agents=agents, topology=build_topology(settings), template=template)


def build_topology(settings: TeamConfig) -> Topology:
    """Single, or the pipeline whose closing reviser and verifier go again while the verifier rejects."""
    names = tuple(agent.name for agent in settings.agents)
    if settings.topology == "single":
        return Single(agent=names[0])
    loops = [agent.role for agent in settings.agents[-2:]] == ["reviser", "verifier"]
    return Pipeline(agents=names, num_looped=2 if loops else 0, max_rounds=settings.max_revisions)


def with_adapters(run: Run) -> Run:
    """Freeze the base and give every policy its adapter."""
    settings: AdapterConfig = run.config.adapters
    policies = list(dict.fromkeys(agent.policy for agent in run.team.agents.values()))
    bank = AdapterBank.install(
        run.model, policies, rank=settings.rank, alpha=settings.alpha, target_modules=settings.target_modules, seed=run.config.seed
    )
    for policy in policies if settings.path else []:
        bank.load(policy, Path(settings.path) / policy)
    engine = NativeEngine(
        run.model, run.tokenizer, bank=bank, scope=settings.scope, max_rows=run.config.rollout.max_rows
    )  # fmt: skip
    return replace(run, bank=bank, engine=engine)


def build_learner(run: Run, method: SFTConfig | ATGRPOConfig) -> Learner:
    """The optimizer of one phase."""
    return Learner(
        run.model, run.bank, DataParallel(run.world), method, scope=run.config.adapters.scope,
        max_tree_tokens=run.config.model.max_tree_tokens,
        temperature=run.config.rollout.temperature if isinstance(method, ATGRPOConfig) else 1.0,
    )  # fmt: skip


def play_all(
    run: Run, tasks: Sequence[Task], sampling: Sampling, *, seed: int, label: str, team: Team | None = None, step: int = 0,
    keep: bool = True, title: str = "",
) -> list[Trace]:  # fmt: skip
    """Play one episode a task, shared out over the ranks; every rank gets all traces, in the order of the tasks.

    With `keep`, each trace goes to this rank's file under traces/ as soon as it ends; without, only if interrupted.
    """
    how = Play(team=team or run.team, sampling=sampling, judge=run.judge, seed=seed)
    mine = tasks[run.world.rank :: run.world.size]
    suffix = f".rank{run.world.rank}" if run.world.size > 1 else ""
    file = run.folder / "traces" / f"{label}{suffix}.jsonl"
    held: list[Trace] = []
    bar, bar_task = run.progress(title, len(mine))

    def on_trace(trace: Trace) -> None:
        held.append(trace)
        bar.advance(bar_task)
        if keep:
            trace_store.write(file, [trace])

    live = max(1, run.config.rollout.max_rows // sampling.group_size)
    try:
        with bar if title else _Silent():
            traces = collect(run.engine, mine, how, step=step, label=label, max_live=live, on_trace=on_trace)
    except KeyboardInterrupt:
        if not keep:
            trace_store.write(file, held)
        raise
    if run.world.size == 1:
        return traces
    lines = gather_lines(run.world, [trace_store.to_json(trace) for trace in traces])
    gathered = iter(trace_store.from_json(line) for line in lines)
    ordered: dict[int, Trace] = {}
    for rank in range(run.world.size):
        ordered |= {number: next(gathered) for number in range(rank, len(tasks), run.world.size)}
    return [ordered[number] for number in range(len(tasks))]


class _Silent:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def train(run: Run) -> None:
    """Run the configured method and save the weights."""
    method = run.config.method
    if isinstance(method, SFTConfig):
        fit_sft(run, method, "train")
    else:
        fit_at_grpo(run, method)
    if run.world.is_first:
        save(run.folder, run.model, run.tokenizer, run.bank, base_model=run.config.model.path)


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

    bar, bar_task = run.progress("supervised fine-tuning", method.steps)
    with bar:
        fit_offline(
            batch=batch, learner=build_learner(run, method), loss=loss_of(method),
            log=_logger(run, phase, method.steps, lambda: bar.advance(bar_task)), steps=range(method.steps),
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
    return ReferenceDemonstrator(grade=grade, wrong_rate=method.wrong_rate, compact=isinstance(run.team.template, CompactTemplate))


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

    def collect_batch(step: int) -> list[Trace]:
        rng = Random(derive_seed(run.config.seed, "tasks", step))
        tasks = rng.sample(questions, k=min(method.tasks_per_step, len(questions)))
        return play_all(run, tasks, sampling, seed=derive_seed(run.config.seed, "train", step), label="train", step=step, keep=False)

    def credit(traces: Sequence[Trace]) -> tuple[list[Sample], int, Mapping[str, float]]:
        credited = at_grpo(traces, groups)
        if run.world.is_first:
            trace_store.write(run.folder / "traces" / "train.jsonl", credited)
        accuracy = sum(trace.reward or 0.0 for trace in credited) / len(credited)
        return to_samples(credited), num_group_tokens(credited), {"accuracy": accuracy, **group_metrics(credited)}

    bar, bar_task = run.progress("AT-GRPO", method.steps)
    with bar:
        fit_online(
            collect=collect_batch, credit=credit, learner=build_learner(run, method), loss=loss_of(method),
            push=lambda version: run.engine.load(version=version), steps=range(method.steps),
            log=_logger(run, "train", method.steps, lambda: bar.advance(bar_task)), updates_per_batch=method.updates_per_batch,
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
    """The team and its controls on the held-out questions, at every configured temperature."""
    settings = run.config.evaluation
    tasks = run.test_tasks[: settings.num_tasks]
    rows: list[benchmark.Row] = []
    for temperature in settings.temperatures:
        label = f"{phase}-T{temperature:g}"
        sampling = Sampling(temperature=temperature, top_p=run.config.rollout.top_p, top_k=run.config.rollout.top_k)
        traces = play_all(run, tasks, sampling, seed=settings.seed, label=label, title=f"evaluate {phase}, T={temperature:g}")
        team = benchmark.team_row(traces, phase=phase, temperature=temperature)
        rows.append(team)
        if len(run.team.agents) > 1:
            rows.append(benchmark.first_speaker_row(traces, phase=phase, temperature=temperature))
        if settings.controls and temperature > 0:
            rows += controls(run, tasks, sampling, traces, team)
    return rows


def controls(run: Run, tasks: Sequence[Task], sampling: Sampling, traces: Sequence[Trace], team: benchmark.Row) -> list[benchmark.Row]:
    """Majority vote of the first answering agent, and its fresh tries judged by the first critic, at the team's tokens."""
    first = traces[0].path[0].agent
    critic = next((name for name, agent in run.team.agents.items() if agent.role.produces == "verdict"), None)
    seed = run.config.evaluation.seed
    title = f"controls {team.phase}, T={team.temperature:g}"
    tokens = sum(len(trace.path[0].completion_ids) for trace in traces) / len(traces)
    votes = replace(sampling, group_size=benchmark.equal_budget(team.tokens_per_question, tokens))
    alone = replace(run.team, topology=Single(agent=first))
    voted = play_all(run, tasks, votes, seed=seed, label=f"{team.phase}-vote", team=alone, keep=False, title=title)
    rows = [benchmark.vote_row(voted, phase=team.phase, temperature=team.temperature)]
    if critic is not None:
        tokens += sum(len(t.completion_ids) for trace in traces for t in trace.path if t.agent == critic) / len(traces)
        size = benchmark.equal_budget(team.tokens_per_question, tokens)
        judged = replace(run.team, topology=Pipeline(agents=(first, critic)))
        made = best_of_n(run, tasks, sampling, judged, size, title)
        rows.append(benchmark.best_of_n_row(made, phase=team.phase, temperature=team.temperature))
    return rows


def best_of_n(run: Run, tasks: Sequence[Task], sampling: Sampling, judged: Team, size: int, title: str) -> list[list[Trace]]:
    """Fresh tries for every question until the critic accepts one or `size` are made."""
    made: list[list[Trace]] = [[] for _ in tasks]
    for number in range(size):
        waiting = [i for i, tries in enumerate(made) if not tries or tries[-1].path[-1].verdict is not True]
        if not waiting:
            break
        seed = derive_seed(run.config.evaluation.seed, "try", number)
        tries = play_all(run, [tasks[i] for i in waiting], sampling, seed=seed, label="best-of-n", team=judged, keep=False, title=title)
        for i, trace in zip(waiting, tries, strict=True):
            made[i].append(trace)
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
    traces = play_all(run, tasks, sampling, seed=run.config.seed, label="rollout", title="rollout")
    right = sum(trace.reward or 0.0 for trace in traces)
    failed = sum(turn.finish == "error" for trace in traces for turn in trace.turns)
    run.console.print(
        f"{len(traces)} traces in {run.folder / 'traces'}: {right:g} right, {failed} failed turns", highlight=False
    )
    return traces
