"""Composition root: builds the collaborators from a RunConfig and runs the phases. Nobody imports it but the face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from ruamel.yaml import YAML

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import ChatTemplate, CompactTemplate, Template
from mas_hpc.config import AdapterConfig, RecordConfig, RunConfig, TeamConfig
from mas_hpc.config_methods import OnlineConfig
from mas_hpc.data import trace_store
from mas_hpc.data.tasks import load_tasks
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError, MasHpcError
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.heads import ScalarHead
from mas_hpc.models.load import checkpoint_activations, load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline, Single, Topology
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.training.log import MetricsLog
from mas_hpc.training.network import Network
from mas_hpc.types import Task, Trace, Turn


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
        return VerifiableJudge(break_penalty=method.break_penalty if isinstance(method, OnlineConfig) else 0.0)

    def network(self, *, head: ScalarHead | None = None, temperature: float = 1.0) -> Network:
        """The model and its adapters as the trainer sees them."""
        return Network(
            model=self.model, bank=self.bank, head=head, scope=self.config.adapters.scope,
            max_tree_tokens=self.config.model.max_tree_tokens, temperature=temperature,
            checkpointing=self.config.model.activation_checkpointing,
        )  # fmt: skip

    def progress(self, title: str, total: int, *, shown: bool = True) -> tuple[Progress, Callable[[], None]]:
        """A progress bar of the first rank, and what advances it by one; not shown inside another."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not (shown and self.world.is_first and self.console.is_terminal)
        bar = Progress(*columns, console=self.console, disable=hidden, transient=True)
        task = bar.add_task(title, total=total)
        return bar, lambda: bar.advance(task)


def build(config: RunConfig, world: World, console: Console) -> Run:
    """Load tasks and model, make the run folder, write the resolved config. Raises ConfigError, DataError, CheckpointError."""
    check_world(config, world)
    train_tasks, test_tasks = ((), ()) if isinstance(config.data, RecordConfig) else load_tasks(config.data)
    with console.status(f"loading {config.model.path} ..."):
        model, tokenizer = load_model(config.model, seed=config.seed)
    if config.model.activation_checkpointing:
        checkpoint_activations(model)
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


def check_world(config: RunConfig, world: World) -> None:
    """Refuse a number of ranks that the batch does not divide into."""
    method = config.method
    if isinstance(method, OnlineConfig) and method.tasks_per_step % world.size:
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
        chosen = str(next(folder for folder in candidates if _make(folder)))
    return Path(gather_lines(world, [chosen] if chosen else [])[0])


def _make(folder: Path) -> bool:
    """Whether this process made the folder: of several that start at once, one does."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def write_config(config: RunConfig, folder: Path) -> None:
    """The resolved config, every knob included, as YAML."""
    with (folder / "config.yaml").open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(config.model_dump(mode="json"), stream)


def build_team(settings: TeamConfig, config: RunConfig, tokenizer: Any) -> Team:
    """Agents, topology and the dialect of the model."""
    template: Template = ChatTemplate(tokenizer) if tokenizer.chat_template else CompactTemplate(tokenizer)
    agents = {
        agent.name: Agent(
            name=agent.name, role=ROLES[agent.role], sees=agent.sees, prompt=agent.prompt,
            policy=agent.name if config.adapters.policies == "per_agent" else "shared",
            max_new_tokens=agent.max_new_tokens or config.rollout.max_new_tokens,
        )
        for agent in (settings.agents[:1] if settings.topology == "single" else settings.agents)
    }  # fmt: skip
    return Team(agents=agents, topology=build_topology(settings), template=template)


def build_topology(settings: TeamConfig) -> Topology:
    """Single, or the pipeline whose closing reviser and verifier go again while the verifier rejects."""
    names = tuple(agent.name for agent in settings.agents)
    if settings.topology == "single":
        return Single(agent=names[0])
    loops = [agent.role for agent in settings.agents[-2:]] == ["reviser", "verifier"]
    return Pipeline(
        agents=names,
        stop_when_accepted=settings.stop_when_accepted,
        num_looped=2 if loops else 0,
        max_rounds=settings.max_revisions,
    )


def with_adapters(run: Run) -> Run:
    """Freeze the base and give every policy its adapter."""
    settings: AdapterConfig = run.config.adapters
    policies = list(dict.fromkeys(agent.policy for agent in run.team.agents.values()))
    bank = AdapterBank.install(
        run.model,
        policies,
        rank=settings.rank,
        alpha=settings.alpha,
        rank_stabilized=settings.rank_stabilized,
        target_modules=settings.target_modules,
        seed=run.config.seed,
    )
    for policy in policies if settings.path else []:
        bank.load(policy, Path(settings.path) / policy)
    engine = NativeEngine(
        run.model, run.tokenizer, bank=bank, scope=settings.scope, max_rows=run.config.rollout.max_rows
    )  # fmt: skip
    return replace(run, bank=bank, engine=engine)


def how_to_play(run: Run, sampling: Sampling, seed: int, team: Team | None = None) -> Play:
    """Episodes of the run's team, or of a variation of it."""
    return Play(team=team or run.team, sampling=sampling, judge=run.judge, seed=seed)


def play_all(
    run: Run, tasks: Sequence[Task], how: Play, *, label: str, step: int = 0, keep: bool = True, bar: bool = True,
    starts: Sequence[Sequence[Turn]] = (),
) -> list[Trace]:  # fmt: skip
    """Play `sampling.episodes` of each task, shared out over the ranks; all get all traces, in the order of the tasks.

    With `keep`, each trace goes to this rank's file under traces/ as soon as it ends; without, only if the run is
    interrupted or fails before the caller has them.
    """
    turn = slice(run.world.rank, None, run.world.size)
    mine = tasks[turn]
    suffix = f".rank{run.world.rank}" if run.world.size > 1 else ""
    file = run.folder / "traces" / f"{label}{suffix}.jsonl"
    held: list[Trace] = []
    progress, advance = run.progress(label, len(mine) * how.sampling.episodes, shown=bar)

    def on_trace(trace: Trace) -> None:
        held.append(trace)
        advance()
        if keep:
            trace_store.write(file, [trace])

    live = max(1, run.config.rollout.max_rows // how.sampling.group_size)
    try:
        with progress:
            traces = collect(
                run.engine, mine, how, step=step, label=label, max_live=live, on_trace=on_trace, starts=starts[turn]
            )
            return traces if run.world.size == 1 else _gather(run.world, traces, len(tasks), how.sampling.episodes)
    except (KeyboardInterrupt, MasHpcError):
        if not keep:
            trace_store.write(file, held)
        raise


def _gather(world: World, traces: Sequence[Trace], num_tasks: int, episodes: int) -> list[Trace]:
    """All ranks' traces in the order of the tasks, which were dealt out in turn."""
    lines = gather_lines(world, [trace_store.to_json(trace) for trace in traces])
    gathered = iter(trace_store.from_json(line) for line in lines)
    ordered: dict[int, list[Trace]] = {}
    for rank in range(world.size):
        ordered |= {number: [next(gathered) for _ in range(episodes)] for number in range(rank, num_tasks, world.size)}
    return [trace for number in range(num_tasks) for trace in ordered[number]]
