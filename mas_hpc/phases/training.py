"""The training phases of a run: warm start, adapters, the configured method, and its weights on disk."""

from __future__ import annotations

import json
from dataclasses import replace

from mas_hpc.config_methods import OfflineConfig, ProcessRewardConfig, RewardModelConfig
from mas_hpc.distributed.tensor_layers import group_of
from mas_hpc.loading import sharing
from mas_hpc.phases import online
from mas_hpc.phases.offline import fit_offline_method
from mas_hpc.phases.reward import save_card, step_separator
from mas_hpc.run import Run, with_adapters
from mas_hpc.serving import push, serve
from mas_hpc.training.export import save
from mas_hpc.training.network import Network


def check(run: Run) -> None:
    """Refuse a method that could not run, before the warm start takes its time. Raises ConfigError, DataError."""
    if not isinstance(run.config.method, OfflineConfig):
        online.check(run, run.config.method)


def warm_up(run: Run) -> Run:
    """The warm start of the base model and the adapters on top of it, each only if configured; then the engine that serves."""
    warm_start = run.config.warm_start
    if warm_start and warm_start.steps:
        fit_offline_method(run, warm_start, "warm_start")
    return serve(with_adapters(run) if run.config.adapters.policies == "per_agent" else run)


def keep(run: Run) -> Run:
    """Save what the warm start trained, so that the traces that follow can be replayed; the run itself."""
    if run.config.warm_start and run.config.warm_start.steps:
        _save(run, run.network())
    return run


def _save(run: Run, network: Network) -> None:
    """Collective."""
    network = _whole(run, network)
    if not run.world.is_first:
        return
    warm_start = run.config.warm_start
    trained = warm_start is not None and warm_start.steps > 0
    save(run.folder, network, run.tokenizer, base_model=run.config.model.path, base_trained=trained)


def _whole(run: Run, network: Network) -> Network:
    """On the first rank the network with all weights, on the host where the ranks of a tensor group have parts of it."""
    share = sharing(run.config, run.strategy) if group_of(network.model) else None
    if share is None or share.group_number:
        return network
    gathered = ((name, tensor.to("cpu", copy=True)) for name, tensor in share.make_whole(network.model))
    weights = {name: tensor for name, tensor in gathered if run.world.is_first}
    return network.copy(weights) if run.world.is_first else network


def train(run: Run) -> None:
    """Run the configured method and save the weights, with the version that completions then carry."""
    method = run.config.method
    if isinstance(method, OfflineConfig):
        network = fit_offline_method(run, method, "train")
        push(run, 1)
    else:
        network = replace(online.fit_online_method(run, method), head=None)  # the critic's work is done
    _save(run, network)
    if run.world.is_first:
        version = 1 if isinstance(method, OfflineConfig) else method.steps + 1
        (run.folder / "policy_version.json").write_text(json.dumps(version), encoding="utf-8")
        if isinstance(method, RewardModelConfig | ProcessRewardConfig):
            save_card(run.folder / "model", method, step_separator(run))
