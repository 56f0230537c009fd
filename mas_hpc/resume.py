"""Going on with a run that was stopped: whether its folder fits, from which checkpoint, and what later steps left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from mas_hpc.config import RunConfig
from mas_hpc.config_distributed import CheckpointConfig, DistributedConfig, ProfileConfig
from mas_hpc.config_file import load_config
from mas_hpc.data import trace_store
from mas_hpc.distributed.checkpoint_files import PHASES, Phase, Position, unreadable
from mas_hpc.distributed.checkpoints import Checkpoints
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError, ConfigError, DataError

FINISHED = "finished.json"
_HOW = (
    {"name", "runs_dir", "tracking", "rollout.num_tasks"}
    | {f"rollout.{key}" for key in ("placement", "schedule", "max_rows", "prefill_chunk", "kv_gib", "stall_s")}
    | {f"checkpoint.{key}" for key in CheckpointConfig.model_fields}
    | {f"profile.{key}" for key in ProfileConfig.model_fields}
    | {f"distributed.{key}" for key in DistributedConfig.model_fields if key != "compute_dtype"}
)
"""How a run is carried out, not what comes of it."""
TRACES_NEED_NOT = _HOW | {"evaluation.num_tasks"}
"""Keys that may change when traces are played on: they decide how and how many are made, not what is in one."""
TRAINING_NEEDS_NOT = _HOW
"""Keys that may change when training goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A job that trains, and keeps checkpoints.

    Example: Training(job="train", step=20, may_differ=("method.steps",))
    """

    job: str
    step: int | None = None
    """The checkpoint to go on from; None: the newest whole one."""
    may_differ: tuple[str, ...] = ()
    """Keys that may differ from the configuration that the run was started with."""


def check_resumable(config: RunConfig, folder: Path, may_differ: Collection[str] = TRACES_NEED_NOT) -> None:
    """Refuse a folder that another configuration has made. Raises DataError, ConfigError."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: no config.yaml there; expected the folder of a run that was stopped, such as runs/mas")
    before, wanted = _keys(load_config(file)), _keys(config)
    keys = sorted(before.keys() | wanted.keys())
    changed = [key for key in keys if key not in may_differ and before.get(key) != wanted.get(key)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: not as in {file}, so what is there is not this run's; give the configuration that it was "
            "started with, or start a new run"
        )


def check_folder(config: RunConfig, folder: Path, training: Training | None) -> None:
    """Refuse to go on in a folder with another configuration. Raises DataError, ConfigError."""
    if training:
        check_training(config, folder, training)
    else:
        check_resumable(config, folder)


def check_training(config: RunConfig, folder: Path, training: Training) -> None:
    """Refuse a folder that another configuration has trained, but for keys that may differ. Raises DataError, ConfigError."""
    known = _keys(config)
    for key in training.may_differ:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"--may-differ {key}: unknown key; expected section.key" + (f", such as {near[0]}" if near else "")
            )
    check_resumable(config, folder, TRAINING_NEEDS_NOT | set(training.may_differ))


def _keys(config: RunConfig) -> dict[str, Any]:
    """Values by section.key."""
    found: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def begin(
    config: RunConfig, folder: Path, world: World, console: Console, training: Training, *, resumes: bool
) -> tuple[Checkpoints, Position | None]:  # fmt: skip
    """The run's checkpoints, and the one that it goes on from if it `resumes`; see find. Collective."""
    checkpoints = Checkpoints(world, folder / "checkpoints", config.checkpoint)
    if not resumes:
        return checkpoints, None
    position = find(config, checkpoints, training, console, is_asked=world.attempt == 0)
    if position is None:
        cut_back(folder, checkpoints, None, steps=config.method.steps)
    return checkpoints, position


def find(
    config: RunConfig, checkpoints: Checkpoints, training: Training, console: Console, *, is_asked: bool
) -> Position | None:  # fmt: skip
    """The checkpoint that training goes on from; None: it begins again, as only ranks that were restarted do. Collective.

    Raises CheckpointError when there is none that can be used though the user asked, DataError when nothing is left to do.
    """
    step = training.step if is_asked else None  # a restart goes on from what it has written since
    position = find_whole(config, checkpoints, step, console)
    if position is None and is_asked:
        raise no_checkpoint(checkpoints, "a run without one cannot go on: start a new run")
    if position and is_asked and _is_finished(config, checkpoints, training, position):
        raise DataError(
            f"{checkpoints.root.parent}: finished ({training.job}, {position.step} of {config.method.steps} steps): "
            "nothing is left to do; to train on, raise method.steps and say --may-differ method.steps"
        )
    return position


def find_whole(config: RunConfig, checkpoints: Checkpoints, step: int | None, console: Console) -> Position | None:
    """The newest whole checkpoint, or that of a step of training, with the warm start's end that it needs. Collective.

    Raises CheckpointError when these are damaged.
    """
    position = checkpoints.find(step, lambda text: console.print(text, style="yellow", highlight=False))
    start = end_of_warm_start(config)
    if start and position and position.phase == "train" and (wrong := checkpoints.problems(start)):
        reason = f"{position.name} continues it, and {wrong[0]}"
        raise unreadable(checkpoints.root / start.name, reason, "start a new run")
    return position


def no_checkpoint(checkpoints: Checkpoints, remedy: str) -> CheckpointError:
    """The error of a run that keeps none."""
    return unreadable(checkpoints.root, "no checkpoint there (checkpoint.every)", remedy)


def end_of_warm_start(config: RunConfig) -> Position | None:
    """The checkpoint that training begins from; None without a warm start."""
    steps = config.warm_start.steps if config.warm_start else 0
    return Position(phase="warm_start", step=steps) if steps else None


def _is_finished(config: RunConfig, checkpoints: Checkpoints, training: Training, position: Position) -> bool:
    file = checkpoints.root.parent / FINISHED
    jobs = [file.read_text(encoding="utf-8")] if checkpoints.world.is_first and file.is_file() else []
    is_over = position.phase == "train" and position.step >= config.method.steps
    return is_over and training.job in gather_lines(checkpoints.world, jobs)


def mark_finished(folder: Path, world: World, job: str) -> None:
    """Say in the folder that the job has done all it had to."""
    if world.is_first:
        (folder / FINISHED).write_text(job, encoding="utf-8")


# ---- what is forgotten


def cut_back(folder: Path, checkpoints: Checkpoints, position: Position | None, *, steps: int) -> None:
    """Forget what an earlier attempt has recorded of steps after `position`, or of training at all: they come again.

    Metrics, checkpoints, and traces of training and, where some of its `steps` are left, of the evaluation after it: the files
    are those of a run that was never stopped. Collective.
    """
    if checkpoints.world.is_first:
        done = position.step if position and position.phase == "train" else 0
        cut(folder / "metrics.jsonl", lambda line: _is_later(line, position))
        for file in trace_store.parts(folder / "traces", "train"):
            cut(file, lambda line: line["step"] >= done)
        for file in (folder / "traces").glob("after-*.jsonl") if done < steps else ():
            file.unlink()
        (folder / FINISHED).unlink(missing_ok=True)
    checkpoints.forget_after(position)


def cut(file: Path, is_later: Callable[[dict[str, Any]], bool]) -> None:
    """End a file of JSON lines before the first that is later, or that its writer could not finish."""
    if not file.is_file():
        return
    size = 0
    with file.open("r+b") as stream:
        for line in stream:
            if not line.endswith(b"\n") or is_later(json.loads(line)):
                break
            size += len(line)
        stream.truncate(size)


def _is_later(line: Mapping[str, Any], position: Position | None) -> bool:
    """Whether metrics are of a step after the position; looks at held-out data bear the number of steps that were done."""
    phase, _, look = line["phase"].partition("/")
    if phase not in PHASES:
        return False
    known: Phase = phase
    return position is None or Position(phase=known, step=line["step"] + (not look)).order > position.order
