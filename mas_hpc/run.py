"""Composition root: builds the collaborators from a RunConfig and runs the phases. Nobody imports it but the face."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from ruamel.yaml import YAML

from mas_hpc.config import AdapterConfig, ModelConfig, RecordConfig, RunConfig
from mas_hpc.config_file import load_config
from mas_hpc.config_methods import OnlineConfig
from mas_hpc.data.tasks import load_tasks
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.transport import open_transport
from mas_hpc.distributed.world import World
from mas_hpc.engines import Shards, build_engine, has_shared_model
from mas_hpc.errors import CheckpointError, ConfigError, DataError
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.heads import ScalarHead
from mas_hpc.models.load import checkpoint_activations, count_parameters, load_model, load_tokenizer
from mas_hpc.orchestration.episode import Team
from mas_hpc.rollout.engine import RolloutEngine
from mas_hpc.rollout.placement import Mode, Placement, place, placement_table
from mas_hpc.rollout.sharded import ShardedEngine
from mas_hpc.rollout.vllm import check as check_vllm
from mas_hpc.teams import build_team, served_models
from mas_hpc.training.log import MetricsLog
from mas_hpc.training.network import Network
from mas_hpc.types import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the phases share."""

    config: RunConfig
    world: World
    folder: Path
    console: Console
    log: MetricsLog
    model: Any
    """The model that is trained, and the base under adapters; None where other ranks serve it and nothing is trained."""
    tokenizer: Any
    bank: AdapterBank | None
    other_models: Mapping[str, Any]
    """Models by the policy that they serve here, of those in team.models; never trained."""
    shards: Shards | None
    """How the ranks serve each other; None where each serves itself."""
    engine: RolloutEngine
    copy: RolloutEngine | None = None
    """The engine of a copy of the trained model, which is a part of `engine`; None where the model itself serves."""
    team: Team
    train_tasks: tuple[Task, ...]
    test_tasks: tuple[Task, ...]
    resumes: bool = False
    """Whether the folder may hold what an earlier attempt at this run has finished."""
    lock: IO[str] | None = None
    """What keeps other runs out of the folder, on the rank that holds it."""

    @property
    def judge(self) -> VerifiableJudge:
        """Ground truth for rewards."""
        method = self.config.method
        return VerifiableJudge(break_penalty=method.break_penalty if isinstance(method, OnlineConfig) else 0.0)

    def serve_others(self) -> None:
        """After work that was shared out beforehand: serve other ranks until theirs is done too."""
        if isinstance(self.engine, ShardedEngine):
            self.engine.serve_others()

    def close(self) -> None:
        """Collective: the ranks' engines serve each other no more, and the folder is free."""
        if self.shards:
            self.shards.transport.close()
        if self.lock:
            self.lock.close()

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


def build(config: RunConfig, world: World, console: Console, resume: Path | None = None, *, trains: bool = True) -> Run:
    """Load tasks and models, make the run folder, write the resolved config.

    Raises ConfigError, DataError, CheckpointError, and LaunchError for fewer ranks than rollout.placement needs.

    With `resume`, or when a supervisor has restarted the ranks, the folder is that of the earlier attempt: traces that are kept
    there are not sampled again. Without `trains`, a rank that neither serves the trained model nor warms it up has it not.
    """
    if trains:
        check_world(config, world)
    if resume:
        check_resumable(config, resume)

    lock = None

    def claim() -> Path:
        nonlocal lock
        folder = resume or claim_folder(config.folder, world)
        if world.is_first:
            lock = lock_folder(folder)
            write_config(config, folder)
        return folder

    loads = not isinstance(config.data, RecordConfig)
    trains = trains or bool(config.warm_start and config.warm_start.steps)
    run = _assemble(config, world, console, claim, mode=config.rollout.placement, tasks=loads, trains=trains)
    return replace(run, resumes=resume is not None or world.attempt > 0, lock=lock)


TRACES_NEED_NOT = {"name", "runs_dir", "tracking", "evaluation.num_tasks", "rollout.num_tasks"} | {
    f"rollout.{key}" for key in ("placement", "schedule", "max_rows", "prefill_chunk", "kv_gib", "stall_s")
}
"""Keys that may change when a run is resumed: they decide how and how many traces are made, not what is in one."""


def check_resumable(config: RunConfig, folder: Path) -> None:
    """Refuse a folder whose traces another configuration has made. Raises DataError, ConfigError."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: no config.yaml there; expected the folder of a run that was stopped, such as runs/mas")
    before, wanted = _keys(load_config(file)), _keys(config)
    keys = sorted(before.keys() | wanted.keys())
    changed = [key for key in keys if key not in TRACES_NEED_NOT and before.get(key) != wanted.get(key)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: not as in {file}, so its traces are not this run's; give the configuration it was started "
            "with, or start a new run"
        )


def _keys(config: RunConfig) -> dict[str, Any]:
    """Values by section.key."""
    found: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def reopen(folder: Path, world: World, console: Console) -> Run:
    """A finished run with the weights that it saved, if it saved any. Raises DataError for a folder that is no run's.

    The engine stamps completions with the policy version of those weights. Every rank has every model, whatever
    rollout.placement says: replays are shared out beforehand.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: no config.yaml there; expected the folder of a run, such as runs/mas")
    config = load_config(file)
    if (folder / "adapters").is_dir():
        config = config.model_copy(update={"adapters": config.adapters.model_copy(update={"path": str(folder / "adapters")})})
    if (folder / "model").is_dir():
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder / "model")})})
    elif config.warm_start and config.warm_start.steps:
        raise DataError(f"{folder}: its warm-started weights were not saved; expected {folder / 'model'}: run it again")
    run = _assemble(config, world, console, lambda: folder, mode="colocated", tasks=False, trains=True)
    run = with_adapters(run) if config.adapters.policies == "per_agent" else run
    run.engine.load(version=policy_version(folder))
    return run


def policy_version(folder: Path) -> int:
    """The version of the weights in a run folder; 0 where nothing was trained after the warm start."""
    file = folder / "policy_version.json"
    return int(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0


def _assemble(
    config: RunConfig, world: World, console: Console, claim: Callable[[], Path], *, mode: Mode, tasks: bool, trains: bool
) -> Run:
    """Load everything, then claim the folder: a mistake leaves no empty one behind."""
    train_tasks, test_tasks = load_tasks(config.data) if tasks else ((), ())  # type: ignore[arg-type]
    if config.rollout.engine == "vllm":
        check_vllm(config)
    placement = place_models(config, world, console, mode)
    served = placement.policies_of(world.rank)
    saves = config.rollout.engine == "vllm" and world.is_first  # what others start vLLM on
    if trains or saves or placement.mode == "colocated" or has_shared_model(config, served):
        with console.status(f"loading {config.model.path} ..."):
            model, tokenizer = load_model(config.model, seed=config.seed)
        if config.model.activation_checkpointing:
            checkpoint_activations(model)
    else:
        model, tokenizer = None, load_tokenizer(config.model)
    other_models = {
        policy: load_other(config, path, tokenizer, f"team.models.{policy}")
        for policy, path in config.team.models.items() if policy in served
    }  # fmt: skip
    team = build_team(config.team, config, tokenizer)
    folder = claim()
    shards = None
    if placement.mode == "sharded":
        shards = Shards(placement=placement, transport=open_transport(world, timeout_s=config.rollout.stall_s))
    return Run(
        config=config, world=world, folder=folder, console=console,
        log=MetricsLog(folder, is_writer=world.is_first, tracking=config.tracking),
        model=model, tokenizer=tokenizer, bank=None, other_models=other_models, shards=shards,
        engine=build_engine(config, model, tokenizer, other_models, shards),
        team=team, train_tasks=train_tasks, test_tasks=test_tasks,
    )  # fmt: skip


def place_models(config: RunConfig, world: World, console: Console, mode: Mode) -> Placement:
    """Which ranks serve which policies; shown where they are not all served by all. Raises LaunchError, ConfigError."""

    def count(key: str, path: str) -> int:
        with _blaming(key):
            return count_parameters(_beside(config, path)) if world.size > 1 and config.team.models else 1

    models = served_models(config, count)
    placement = place(models, ranks=world.size, mode=mode, hosts=world.hosts)
    if placement.mode == "sharded":
        console.print(placement_table(placement, models, world.hosts))
    return placement


def load_other(config: RunConfig, path: str, tokenizer: Any, key: str) -> Any:
    """A model of the run's vocabulary beside its own. Raises ConfigError for another vocabulary."""
    with _blaming(key):
        model, its_tokenizer = load_model(_beside(config, path), seed=config.seed)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={path!r}: its vocabulary is not that of model.path={config.model.path!r}, so the agents could not read "
            "each other's tokens; choose models of one family"
        )
    return model.requires_grad_(False)


def _beside(config: RunConfig, path: str) -> ModelConfig:
    return config.model.model_copy(update={"path": path})


@contextmanager
def _blaming(key: str) -> Iterator[None]:
    """Errors of model.path are those of another key."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(str(error).replace("model.path=", f"{key}=", 1)) from None


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
    """A folder of its own for this run: the wanted name, or the first free name-2, name-3, ...; all ranks agree.

    Ranks that a supervisor has restarted get the folder that they had before.
    """
    chosen, key = "", f"folder of {wanted}"
    if world.is_first:
        if world.attempt and world.run_store and world.run_store.check([key]):
            chosen = world.run_store.get(key).decode()
        else:
            candidates = (wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 10_000)))
            chosen = str(next(folder for folder in candidates if _make(folder)))
        if world.run_store:
            world.run_store.set(key, chosen)
    return Path(gather_lines(world, [chosen] if chosen else [])[0])


def lock_folder(folder: Path) -> IO[str]:
    """Keep other runs out of the folder until the file is closed or this process ends.

    Raises DataError when another run is in it: both would play, and write, what is missing. A file system without locks
    keeps nobody out.
    """
    stream = (folder / ".lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise DataError(
            f"{folder}: another run is writing there; wait until it has ended, or stop it, and resume then"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return stream


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


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


def with_adapters(run: Run) -> Run:
    """Freeze the base and give every policy its adapter."""
    if run.model is None:
        return run
    settings: AdapterConfig = run.config.adapters
    policies = list(dict.fromkeys(a.policy for a in run.team.agents.values() if a.policy not in run.config.team.models))
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
    engine = build_engine(run.config, run.model, run.tokenizer, run.other_models, run.shards, bank)
    return replace(run, bank=bank, engine=engine)
