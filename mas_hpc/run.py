"""Composition root: builds the collaborators from a RunConfig and runs the phases. Nobody imports it but the face."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from ruamel.yaml import YAML

from mas_hpc.config import AdapterConfig, Gsm8kConfig, MathConfig, RecordConfig, RunConfig
from mas_hpc.config_file import load_config
from mas_hpc.config_methods import OnlineConfig
from mas_hpc.data.files import fetch
from mas_hpc.data.tasks import load_tasks
from mas_hpc.distributed.caches import first_on_host
from mas_hpc.distributed.checkpoint_files import Phase, Position
from mas_hpc.distributed.checkpoints import Checkpoints
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.strategies import build_strategy
from mas_hpc.distributed.strategy import Strategy
from mas_hpc.distributed.tensor_layers import cut, group_of
from mas_hpc.distributed.transport import open_transport
from mas_hpc.distributed.watchdog import STOP
from mas_hpc.distributed.world import World
from mas_hpc.engines import Shards, build_engine, has_shared_model
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.loading import Loaded, fetch_models, load_other, load_trained, never_serves, place_models, sharing
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.heads import ScalarHead
from mas_hpc.models.load import load_tokenizer
from mas_hpc.orchestration.episode import Team
from mas_hpc.resume import Training, begin, check_folder, end_of_warm_start
from mas_hpc.rollout.engine import RolloutEngine
from mas_hpc.rollout.placement import Mode
from mas_hpc.rollout.sharded import ShardedEngine
from mas_hpc.rollout.tensor import Said, TensorEngine
from mas_hpc.rollout.vllm import check as check_vllm
from mas_hpc.teams import build_team
from mas_hpc.training.kernels import report_kernels
from mas_hpc.training.log import MetricsLog
from mas_hpc.training.network import Network
from mas_hpc.training.timing import StepTimer, build_timer
from mas_hpc.types import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the phases share."""

    config: RunConfig
    world: World
    strategy: Strategy
    """How training is spread over the ranks."""
    folder: Path
    console: Console
    log: MetricsLog
    model: Any
    """The model that is trained, and the base under adapters; None where other ranks serve it and nothing is trained."""
    source: Path | None
    """Where its weights are, if the ranks read them only when they train; the model is on the meta device then."""
    tokenizer: Any
    bank: AdapterBank | None
    other_models: Mapping[str, Any]
    """Models by the policy that they serve here, of those in team.models; never trained."""
    leaders: World | None
    """The first ranks of tensor groups that serve together, and the place of this one's among them; None: there are none."""
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
    timer: StepTimer = field(default_factory=StepTimer)
    """Where the time of a training step goes."""
    checkpoints: Checkpoints | None = None
    """Those of the folder, of a job that trains."""
    position: Position | None = None
    """The checkpoint that training goes on from; None: it begins."""
    lock: IO[str] | None = None
    """What keeps other runs out of the folder, on the rank that holds it."""

    def __post_init__(self) -> None:
        self.world.watch.follow(lambda: self.engine.stats.steps)

    @property
    def judge(self) -> VerifiableJudge:
        """Ground truth for rewards."""
        method = self.config.method
        return VerifiableJudge(break_penalty=method.break_penalty if isinstance(method, OnlineConfig) else 0.0)

    @property
    def players(self) -> World:
        """The ranks that play episodes, and the place among them of this one, or of the one that it follows."""
        return self.leaders or self.world

    @property
    def leads(self) -> bool:
        """Whether this rank plays episodes, and does not only serve its part of the layers to one that does."""
        return self.engine.leads if isinstance(self.engine, TensorEngine) else True

    def led(self, work: Callable[[], Said], encode: Callable[[Said], str], decode: Callable[[str], Said]) -> Said:
        """What work with the engine, all but load and sleep, gives on the rank that leads this one. See TensorEngine."""
        return self.engine.led(work, encode, decode) if isinstance(self.engine, TensorEngine) else work()

    def serve_others(self) -> None:
        """After work that was shared out beforehand: serve other ranks until theirs is done too."""
        if isinstance(self.engine, ShardedEngine):
            self.engine.serve_others()

    def goes_on_from(self, phase: Phase) -> Position | None:
        """The checkpoint of a phase that has begun before; of one that is over, its last."""
        if self.position is None or self.position.phase == phase:
            return self.position
        return end_of_warm_start(self.config) if phase == "warm_start" else None

    def close(self) -> None:
        """Collective: checkpoints are on disk, the ranks' engines serve each other no more, and the folder is free."""
        if self.checkpoints:
            self.checkpoints.close()
        if self.shards:
            self.shards.transport.close()
        self.release()

    def release(self) -> None:
        """Also after a failure: a checkpoint that is being written is waited for, not long, and the folder is free."""
        if self.checkpoints:
            self.checkpoints.close(failed=True)
        if self.lock:
            self.lock.close()

    def network(self, *, head: ScalarHead | None = None, temperature: float = 1.0) -> Network:
        """The model and its adapters as the trainer sees them."""
        head = head.to(self.world.device) if head else None
        return Network(
            model=self.model, source=self.source, bank=self.bank, head=head, scope=self.config.adapters.scope,
            max_tree_tokens=self.config.model.max_tree_tokens, temperature=temperature,
            checkpointing=self.config.model.activation_checkpointing, kernels=self.config.kernels.backend,
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


def build(
    config: RunConfig, world: World, console: Console, resume: Path | None = None, *, trains: bool = True,
    training: Training | None = None,
) -> Run:  # fmt: skip
    """Load tasks and models, make the run folder, write the resolved config.

    Raises ConfigError, DataError, CheckpointError, and LaunchError for fewer ranks than rollout.placement needs.

    With `resume`, or when a supervisor has restarted the ranks, the folder is that of the earlier attempt: traces that are kept
    there are not sampled again, and a job of `training` goes on from a checkpoint. Without `trains`, a rank that neither serves
    the trained model nor warms it up has it not.
    """
    if trains:
        check_world(config, world)
    if resume:
        check_folder(config, resume, training)
    claimed: dict[str, Any] = {"resumes": resume is not None or world.attempt > 0}

    def claim() -> Path:
        folder = resume or claim_folder(config.folder, world)
        if world.is_first:
            claimed["lock"] = lock_folder(folder)
        if training:
            found = begin(config, folder, world, console, training, resumes=claimed["resumes"])
            claimed["checkpoints"], claimed["position"] = found
        if world.is_first:
            (folder / STOP).unlink(missing_ok=True)  # it asked the attempt before
            write_config(config, folder)
        return folder

    if isinstance(config.data, RecordConfig | Gsm8kConfig | MathConfig):
        first_on_host(world, "the data set", partial(fetch, config.data.path))
    loads = not isinstance(config.data, RecordConfig)
    trains = trains or bool(config.warm_start and config.warm_start.steps)
    run = _assemble(
        config, world, console, claim, mode=config.rollout.placement, tasks=loads, trains=trains,
        serves=not (training and never_serves(config, training.job)),
    )  # fmt: skip
    return replace(run, **claimed)


def reopen(folder: Path, world: World, console: Console) -> Run:
    """A finished run with the weights that it saved, if it saved any. Raises DataError for a folder that is no run's.

    The engine stamps completions with the policy version of those weights. Every rank has every model, whatever
    rollout.placement says: replays are shared out beforehand.
    """
    config = config_of(folder)
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


def open_untrained(folder: Path, world: World, console: Console) -> Run:
    """The run in a folder with the weights that it began from, for who replaces them. Raises DataError, CheckpointError."""
    config = config_of(folder)
    native = config.rollout.model_copy(update={"engine": "native"})
    config = config.model_copy(update={"tracking": "none", "rollout": native})
    return _assemble(config, world, console, lambda: folder, mode="colocated", tasks=False, trains=True)


def config_of(folder: Path) -> RunConfig:
    """The resolved configuration of a run. Raises DataError for a folder that is no run's."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: no config.yaml there; expected the folder of a run, such as runs/mas")
    return load_config(file)


def policy_version(folder: Path) -> int:
    """The version of the weights in a run folder; 0 where nothing was trained after the warm start."""
    file = folder / "policy_version.json"
    return int(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0


def _assemble(
    config: RunConfig, world: World, console: Console, claim: Callable[[], Path], *, mode: Mode, tasks: bool, trains: bool,
    serves: bool = True,
) -> Run:  # fmt: skip
    """Load everything, then claim the folder: a mistake leaves no empty one behind."""
    with console.status("looking for models ..."):
        first_on_host(world, "the models", lambda: fetch_models(config))
    train_tasks, test_tasks = load_tasks(config.data) if tasks else ((), ())  # type: ignore[arg-type]
    if config.rollout.engine == "vllm":
        check_vllm(config)
    strategy = build_strategy(world, config.distributed)
    share = sharing(config, strategy) if serves else None
    placement = place_models(config, world, console, "colocated" if share else mode)
    served = placement.policies_of(world.rank)
    saves = config.rollout.engine == "vllm" and world.is_first  # what others start vLLM on
    if trains or saves or placement.mode == "colocated" or has_shared_model(config, served):
        loaded = load_trained(config, world, console, serves=serves, share=share)
    else:
        loaded = Loaded(model=None, tokenizer=load_tokenizer(config.model))
    model, tokenizer = loaded.model, loaded.tokenizer
    other_models = {
        policy: load_other(config, path, tokenizer, f"team.models.{policy}", world.device, share)
        for policy, path in config.team.models.items() if policy in served
    }  # fmt: skip
    team = build_team(config.team, config, tokenizer)
    report_kernels(config.kernels.backend, world.device.type, console)
    folder = claim()
    world.watch.opened(folder)
    shards = None
    if placement.mode == "sharded":
        shards = Shards(placement=placement, transport=open_transport(world, timeout_s=config.rollout.stall_s))
    return Run(
        config=config, world=world, strategy=strategy, folder=folder, console=console,
        log=MetricsLog(folder, is_writer=world.is_first, tracking=config.tracking),
        model=model, source=loaded.source, tokenizer=tokenizer, bank=None, other_models=other_models, shards=shards,
        leaders=share.leaders if share else None,
        engine=build_engine(config, model, tokenizer, other_models, shards),
        team=team, train_tasks=train_tasks, test_tasks=test_tasks,
        timer=build_timer(model, device=world.device, ranks=world.size, synchronizes=config.profile.count > 0),
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
        device=run.world.device,
    )
    for policy in policies if settings.path else []:
        bank.load(policy, Path(settings.path) / policy)
    if group := group_of(run.model):
        cut(run.model, group)
    engine = build_engine(run.config, run.model, run.tokenizer, run.other_models, run.shards, bank)
    return replace(run, bank=bank, engine=engine)
