"""One optimizer step from samples: pack -> forward -> loss -> backward -> sum over ranks -> clip -> step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mas_hpc_kernels import LogitRule, VocabularyShard
from torch import Tensor, nn
from torch.nn import Parameter

from mas_hpc.config_methods import Optimization
from mas_hpc.data.token_tree import TokenTree
from mas_hpc.distributed.checkpoint_format import read_into
from mas_hpc.distributed.checkpoints import Saved, State
from mas_hpc.distributed.strategy import Strategy
from mas_hpc.distributed.tensor_layers import whole_numel
from mas_hpc.distributed.trained_state import give_memory, started_in
from mas_hpc.errors import DataError
from mas_hpc.training.flops import ModelCost
from mas_hpc.training.guard import Guard
from mas_hpc.training.methods import Objective
from mas_hpc.training.network import Network, TreeModule, embedding_noise
from mas_hpc.training.share import Totals
from mas_hpc.training.timing import StepTimer, memory_peaks
from mas_hpc.types import Sample

HEAD = "head"
"""Name of the scalar head among the groups of parameters."""


class Learner:
    """Owns the optimizer. Policies are parameter groups: their gradients are clipped, and idle ones left alone, one by one."""

    def __init__(
        self, network: Network, strategy: Strategy, optimization: Optimization, *, updates_per_batch: int = 1,
        noise_alpha: float = 0.0, timer: StepTimer | None = None,
    ) -> None:  # fmt: skip
        """`noise_alpha` is NEFTune's; the schedule counts batches, each of `updates_per_batch` steps; `timer` times them."""
        self._served, self._strategy, self._optimization = network, strategy, optimization
        self._timer = timer or StepTimer()
        num_adapters = len(network.bank.policies) if network.bank else 1
        self._cost = ModelCost.of(network.model, num_adapters, whole_numel(network.model))
        network = network.copy() if strategy.shards else network
        self._trained = strategy.train(
            TreeModule(network.model, network.head), trained_parameters(network), partial(build_optimizer, optimization),
            partial(fill_from, network.source) if network.source else None,
        )  # fmt: skip
        self.network = in_lockstep(network, self._trained.module, strategy)
        self._updates_per_batch, self._noise_alpha = updates_per_batch, noise_alpha
        self._num_updates = dict.fromkeys(self._trained.groups, 0)  # an idle one keeps its place in the schedule
        self._num_steps = 0
        self.guard = Guard(optimization.max_skipped, optimization.learning_rate)
        self._noise_generator = torch.Generator().manual_seed(strategy.world.rank)

    @property
    def trained(self) -> list[Parameter]:
        """Every trained parameter."""
        return [parameter for group in self._trained.groups.values() for parameter in group]

    @torch.no_grad()
    def publish(self, *, needed: bool = True) -> None:
        """Bring what was trained into the network that was given, where that is another. Collective.

        If its model has no memory yet, it gets some, on the host, on the ranks where it is `needed`.
        """
        if not self._strategy.shards:
            return
        module = TreeModule(self._served.model, self._served.head)
        if needed and self._served.source:
            give_memory(module, torch.device("cpu"))
            fill_from(self._served.source, dict(module.named_parameters()))
        served = dict(module.named_parameters())
        for name, tensor in self._trained.whole():
            if not served[name].is_meta:
                served[name].copy_(tensor)

    # ---- what is kept of it

    def state(self) -> State:
        """Of a checkpoint: what is trained, the optimizer, its place in the schedule, and this rank's noise. Collective."""
        return State(
            tensors=self._trained.state(), own={"noise": self._noise_generator.get_state()},
            record={
                "num_updates": self._num_updates, "num_steps": self._num_steps, "guard": self.guard.record(),
                "num_shares": self._strategy.world.size,
            },
        )  # fmt: skip

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint; on another number of ranks than wrote it, noise is drawn from another seed. Collective."""
        record = saved.record
        self.go_back(saved)
        self._num_steps = record["num_steps"]
        self.guard.restore_record(record["guard"])
        same_shares = record.get("num_shares", saved.marker.world_size) == self._strategy.world.size
        if saved.same_ranks and same_shares:  # ranks of a tensor group draw the same noise
            noise = self._noise_generator.get_state()
            saved.fill_own({"noise": noise})
            self._noise_generator.set_state(noise)
        else:
            world = self._strategy.world
            self._noise_generator.manual_seed(self._num_steps * world.size + world.rank)

    def go_back(self, saved: Saved) -> None:
        """Take weights, optimizer and schedule of a checkpoint, and leave the rest as it is. Collective."""
        self._trained.restore(saved.fill, started_in(saved.names))
        self._num_updates |= saved.record["num_updates"]

    def weights(self) -> dict[str, Tensor]:
        """A copy, in the host's memory, of what is trained; on each rank its part where it is sharded. Collective."""
        found = {
            name.partition("/")[2]: tensor for name, tensor in self._trained.state().items() if name.startswith("parameter/")
        }
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    def put_back(self, weights: Mapping[str, Tensor]) -> None:
        """Train on from such a copy; the optimizer stays. Collective."""
        self._trained.put_back(weights)

    def update(self, samples: Sequence[Sample], objective: Objective, totals: Totals) -> dict[str, float]:
        """Take one step on `samples`, which are the same on every rank; `totals` are the global denominators.

        Returns loss, entropy (nats per trained token), grad_norm (before clipping; the largest, and with adapters that of
        each), learning_rate, tokens, and the means of the loss's own metrics.
        A step whose loss or gradient is not finite leaves weights, optimizer and schedule alone and gives skipped_steps, 1; and
        restored, 1, when it took them back to the last checkpoint (see Guard).
        Raises DataError when the objective needs the engine's log-probabilities, and a sample has nan or none; RunError when
        too many steps in a row were skipped.
        """
        if objective.behavior:
            check_behavior(samples)
        self._num_steps += 1
        self._trained.zero_grad()
        sums = self._pass(samples, objective, totals, backward=True)
        sums |= {name: (peak, 1.0) for name, peak in memory_peaks(self.network.device).items()}
        active = self._active(samples)
        with self._timer.part("communication"):
            norms = self._trained.clip(active, self._optimization.max_grad_norm)
            metrics = reduce(self._strategy.gather(sums))
        self._timer.collect(metrics)
        metrics["grad_norm"] = float(np.max([0.0, *norms.values()]))  # nan wherever one is
        if self.network.bank:
            metrics |= {f"grad_norm/{group}": norm for group, norm in norms.items()}
        if not math.isfinite(metrics["grad_norm"] + metrics["loss"]):
            found = f"step {self._num_steps}: gradient norms {norms}, loss {metrics['loss']:g}"
            return metrics | {"skipped_steps": 1.0} | ({"restored": 1.0} if self.guard.skipped(found) else {})
        self.guard.took_step()
        self._step(active)
        metrics["learning_rate"] = max(settings["lr"] for settings in self._trained.optimizer.param_groups)
        return metrics

    def _step(self, active: Sequence[str]) -> None:
        """Let the optimizer step, each policy at its place in the schedule."""
        for group, settings in zip(self._trained.groups, self._trained.optimizer.param_groups, strict=True):
            batches = self._num_updates[group] // self._updates_per_batch
            settings["lr"] = self._optimization.learning_rate * schedule(self._optimization, batches)
            self._num_updates[group] += group in active
        with self._timer.part("optimizer"):
            self._trained.step()
        torch.autograd.graph.increment_version(self.trained)  # AdamW's fused kernel does not; engines go by it

    def evaluate(self, samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
        """Loss and metrics of held-out samples, the same on every rank; nothing is trained."""
        with torch.no_grad():
            sums = self._pass(samples, objective, Totals.of(samples), backward=False)
        return reduce(self._strategy.gather(sums))

    def _pass(
        self, samples: Sequence[Sample], objective: Objective, totals: Totals, *, backward: bool
    ) -> dict[str, tuple[float, float]]:
        """Run this rank's forests; return (sum, count) or (extreme, count) of every metric, `loss` with count 1 on one rank."""
        world, sums = self._strategy.world, Sums()
        timed = self._timer.part if backward else nullcontext
        mine = self.network.share(samples, world)
        sums.add("loss", torch.zeros(1), count=1.0 if world.is_first else 0.0)
        for name in ("tokens", "entropy")[: 2 if objective.logprob else 1]:
            sums.add(name, torch.zeros(1), count=0.0)  # named also where a batch trains nothing
        forests = list(self.network.forests(mine, whole=objective.pairs))
        for number, (part, tree) in enumerate(forests, start=1):
            world.watch.moved()
            noise_TD = self._noise(tree) if backward and self._noise_alpha else None
            with (
                timed("forward"),
                self.network.run(tree, logprob=objective.logprob, entropy=objective.logprob, noise_TD=noise_TD) as outputs,
            ):
                loss, metrics = objective.loss(outputs, tree, totals) if part else (outputs.nothing(), {})
                if backward:
                    with timed("backward"):
                        self._trained.backward(loss, is_last=number == len(forests))
            if not part:
                continue
            sums.add("loss", loss.detach(), count=0.0)
            sums.add("tokens", torch.tensor(float(len(tree.target_N))), count=0.0)
            for name, values in ({"entropy": outputs.entropy_N} | metrics).items():
                sums.add(name, values)
            if backward:
                predictors = len(tree.target_N) if objective.logprob else 0
                merge_metric(sums.values, "flops", self._cost.step(tree.position_T, predictors), 0.0)
        return sums.values

    def _noise(self, tree: TokenTree) -> Tensor:
        width = self.network.model.config.hidden_size
        noise_TD = embedding_noise(tree, width, alpha=self._noise_alpha, generator=self._noise_generator)
        return noise_TD.to(tree.token_T.device, self.network.model.dtype)

    def _active(self, samples: Sequence[Sample]) -> list[str]:
        """Groups that the samples train. The others' gradients stay None, so that the optimizer leaves them where they are."""
        written = {sample.policy for sample in samples} | {HEAD}
        if self.network.scope == "speaker":  # what others wrote in the prompts is adapted by them
            written |= {policy for sample in samples for policy, _ in sample.prompt_spans}
        return [name for name in self._trained.groups if samples and (self.network.bank is None or name in written)]


def check_behavior(samples: Sequence[Sample]) -> None:
    """Refuse samples whose tokens the engine gave no log-probability: their ratio, and so the loss, would be nan."""
    without = [
        s.id for s in samples if s.completion_ids and (not s.behavior_logprobs or any(map(math.isnan, s.behavior_logprobs)))
    ]
    if without:
        raise DataError(
            f"{len(without)} of {len(samples)} samples, such as {without[:3]}, lack log-probabilities of the engine, which are "
            "the old ones with method.mismatch=none; set method.mismatch=token_truncate, which gives such tokens the weight 1"
        )


class Sums:
    """Per-item metrics on their way to global means: (sum, count), or (extreme, count) for names that end in /max or /min."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[float, float]] = {}

    def add(self, name: str, values: Tensor, *, count: float | None = None) -> None:
        """Add the items of a tensor; an empty one adds nothing."""
        if values.numel():
            merge_metric(
                self.values, name, float(_reduction(name)(values.double())), values.numel() if count is None else count
            )


def _reduction(name: str) -> Callable[[Tensor], Tensor]:
    return torch.amax if name.endswith("/max") else torch.amin if name.endswith("/min") else torch.sum


def merge_metric(into: dict[str, tuple[float, float]], name: str, value: float, count: float) -> None:
    """Join one partial result with those before it."""
    if name not in into:
        into[name] = (value, count)
        return
    old, old_count = into[name]
    joined = max(old, value) if name.endswith("/max") else min(old, value) if name.endswith("/min") else old + value
    into[name] = (joined, old_count + count)


def reduce(parts: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Global means of the ranks' sums, and their extremes; a count of 0 means that the sum is the result (golden G7)."""
    joined: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            merge_metric(joined, name, value, count)
    extreme = ("/max", "/min")
    return {name: value if name.endswith(extreme) or not count else value / count for name, (value, count) in joined.items()}


def trained_parameters(network: Network) -> dict[str, list[Parameter]]:
    """What each policy trains: its adapter, or all weights of the shared model (with its scalar head, if there is one)."""
    head = list(network.head.parameters()) if network.head else []
    if network.bank is None:
        return {"shared": [parameter for parameter in network.model.parameters() if parameter.requires_grad] + head}
    groups = {policy: network.bank.parameters_of(policy) for policy in network.bank.policies}
    return groups | ({HEAD: head} if head else {})


def fill_from(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the model's weights, of a TreeModule's names, from safetensors; of each this rank's part. Raises CheckpointError."""
    prefix = "model."
    saved = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    read_into(folder, {name: tensor.detach() for name, tensor in saved.items() if ".lora_" not in name}, None)


def in_lockstep(network: Network, module: nn.Module, strategy: Strategy) -> Network:
    """The network as the strategy's module runs it."""
    lockstep = strategy.world if strategy.lockstep else None
    if (tensor := strategy.tensor) is None:
        return replace(network, module=module, lockstep=lockstep)
    start = tensor.part(network.model.get_output_embeddings().out_features).start
    rule = LogitRule(shard=VocabularyShard(start=start, reduce=tensor.reduce))
    return replace(network, module=module, lockstep=lockstep, rule=rule)


def build_optimizer(optimization: Optimization, groups: Iterable[Sequence[Parameter]]) -> torch.optim.Optimizer:
    """AdamW, or Adafactor, whose second moments are factored (arXiv 1804.04235): a fraction of the memory."""
    parameters = [{"params": list(group)} for group in groups]
    if optimization.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=optimization.learning_rate, weight_decay=optimization.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=optimization.learning_rate, betas=(optimization.beta1, optimization.beta2),
        weight_decay=optimization.weight_decay, fused=True,
    )  # fmt: skip


def schedule(optimization: Optimization, step: int) -> float:
    """Factor on the peak rate: linear warm-up, constant, then decay to min_ratio over the last decay_fraction of the steps.

    decay_fraction 1 is the usual linear or cosine schedule, 0 constant, between them warm-up-stable-decay (WSD).
    """
    warmup = min(1.0, (step + 1) / (optimization.warmup_steps + 1))
    decay_steps = max(1.0, optimization.decay_fraction * optimization.steps)
    left = min(1.0, max(0.0, (optimization.steps - step) / decay_steps)) if optimization.decay_fraction else 1.0
    if optimization.decay == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return warmup * (optimization.min_ratio + (1 - optimization.min_ratio) * left)
