"""mas-hpc export: the weights of a checkpoint in the formats that everybody reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mas_hpc.config_methods import OfflineConfig, ProcessRewardConfig, RewardModelConfig
from mas_hpc.distributed.checkpoint_files import Position
from mas_hpc.distributed.checkpoints import Checkpoints
from mas_hpc.distributed.world import World
from mas_hpc.models.heads import ScalarHead
from mas_hpc.phases.reward import save_card, step_separator
from mas_hpc.resume import end_of_warm_start, find_whole, no_checkpoint
from mas_hpc.run import Run, config_of, open_untrained, with_adapters
from mas_hpc.training.export import save
from mas_hpc.training.network import Network, TreeModule


def export(folder: Path, console: Console, *, step: int | None = None, to: Path | None = None) -> Path:
    """Write what a run had trained by a checkpoint, the newest whole one or that of a step; the folder, as save lays it out.

    Without `to` it is <run>/export/<checkpoint>. Load it with model.path=<folder>/model, adapters.path=<folder>/adapters.
    Raises DataError for a folder that is no run's, CheckpointError when there is no such checkpoint, or it is damaged.
    """
    config, world = config_of(folder), World()
    checkpoints = Checkpoints(world, folder / "checkpoints", config.checkpoint)
    position = find_whole(config, checkpoints, step, console)
    if position is None:
        raise no_checkpoint(checkpoints, f"what a run has trained at its end is {folder / 'model'} and {folder / 'adapters'}")
    run = open_untrained(folder, world, console)
    start = end_of_warm_start(config)
    network = run.network()
    if start and position.phase == "train":
        _load(checkpoints, start, network)
    if position.phase == "train":
        run = with_adapters(run) if config.adapters.policies == "per_agent" else run
        network = run.network(head=_head(run, checkpoints, position))
    _load(checkpoints, position, network)
    method, target = config.method, to or folder / "export" / position.name
    if not isinstance(method, OfflineConfig):
        network = replace(network, head=None)  # the critic's
    save(target, network, run.tokenizer, base_model=config.model.path, base_trained=start is not None)
    if network.head and isinstance(method, RewardModelConfig | ProcessRewardConfig):
        save_card(target / "model", method, step_separator(run))
    return target


def _head(run: Run, checkpoints: Checkpoints, position: Position) -> ScalarHead | None:
    names = checkpoints.open(position).under("policy").names
    has_head = any(name.startswith("parameter/head.") for name in names)
    return ScalarHead(run.model.config.hidden_size, seed=run.config.seed) if has_head else None


def _load(checkpoints: Checkpoints, position: Position, network: Network) -> None:
    """Overwrite what the checkpoint's phase trained: everything, or the adapters and the head."""
    parameters = TreeModule(network.model, network.head).named_parameters()
    trained = {name: p for name, p in parameters if network.bank is None or ".lora_" in name or name.startswith("head.")}
    saved = checkpoints.open(position).under("policy")
    saved.fill({f"parameter/{name}": parameter.detach() for name, parameter in trained.items()}, only="parameter/")
