"""One optimizer step from samples: pack -> forward -> loss -> backward -> sum over ranks -> clip -> step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from mas_hpc.config_methods import Optimization
from mas_hpc.data.token_tree import TokenTree
from mas_hpc.distributed.strategy import Strategy
from mas_hpc.errors import DataError, RunError
from mas_hpc.training.methods import Objective
from mas_hpc.training.network import Network, embedding_noise
from mas_hpc.training.share import Totals, share
from mas_hpc.types import Sample

HEAD = "head"
"""Name of the scalar head among the groups of parameters."""


class Learner:
    """Owns the optimizer. Policies are parameter groups: their gradients are clipped, and idle ones left alone, one by one."""

    def __init__(
        self, network: Network, strategy: Strategy, optimization: Optimization, *, updates_per_batch: int = 1,
        noise_alpha: float = 0.0,
    ) -> None:  # fmt: skip
        """`noise_alpha` is NEFTune's; the schedule counts batches, each of `updates_per_batch` steps."""
        self.network, self._strategy, self._optimization = network, strategy, optimization
        self._parameters = trained_parameters(network)
        self._optimizer = build_optimizer(self._parameters.values(), optimization)
        self._updates_per_batch, self._noise_alpha = updates_per_batch, noise_alpha
        self._num_updates = dict.fromkeys(self._parameters, 0)  # of each policy: an idle one keeps its place in the schedule
        self._num_steps = 0
        self._noise_generator = torch.Generator().manual_seed(strategy.world.rank)

    @property
    def trained(self) -> list[Parameter]:
        """Every trained parameter."""
        return [parameter for group in self._parameters.values() for parameter in group]

    def update(self, samples: Sequence[Sample], objective: Objective, totals: Totals) -> dict[str, float]:
        """Take one step on `samples`, which are the same on every rank; `totals` are the global denominators.

        Returns loss, entropy (nats per trained token), grad_norm (before clipping; the largest, and with adapters that of
        each), learning_rate, tokens, and the means of the loss's own metrics.
        Raises DataError when the objective needs the engine's log-probabilities, and a sample has nan or none; RunError,
        before the weights are touched, when a gradient is not finite.
        """
        if objective.behavior:
            check_behavior(samples)
        self._optimizer.zero_grad(set_to_none=True)
        sums = self._pass(samples, objective, totals, backward=True)
        active = self._active(samples)
        self._strategy.sum_gradients([parameter for group in active for parameter in self._parameters[group]])
        metrics = reduce(self._strategy.gather(sums))
        norms = {
            group: float(torch.nn.utils.clip_grad_norm_(self._parameters[group], self._optimization.max_grad_norm))
            for group in active
        }
        if not all(map(math.isfinite, norms.values())):
            raise RunError(
                f"step {self._num_steps + 1}: gradient norms {norms}, loss {metrics['loss']:g}: training has diverged; lower "
                f"the learning rate ({self._optimization.learning_rate:g})"
            )
        for group, settings in zip(self._parameters, self._optimizer.param_groups, strict=True):
            batches = self._num_updates[group] // self._updates_per_batch
            settings["lr"] = self._optimization.learning_rate * schedule(self._optimization, batches)
            self._num_updates[group] += group in norms
        self._optimizer.step()
        torch.autograd.graph.increment_version(self.trained)  # AdamW's fused kernel does not; engines go by it
        self._num_steps += 1
        metrics["learning_rate"] = max(settings["lr"] for settings in self._optimizer.param_groups)
        metrics["grad_norm"] = max(norms.values(), default=0.0)
        return metrics | ({f"grad_norm/{group}": norm for group, norm in norms.items()} if self.network.bank else {})

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
        mine = share(samples, world.rank, world.size)
        sums.add("loss", torch.zeros(1), count=1.0 if world.is_first else 0.0)
        for name in ("tokens", "entropy")[: 2 if objective.logprob else 1]:
            sums.add(name, torch.zeros(1), count=0.0)  # named also where a batch trains nothing
        for _, tree in self.network.forests(mine, whole=objective.pairs):
            noise_TD = self._noise(tree) if backward and self._noise_alpha else None
            with self.network.run(tree, logprob=objective.logprob, entropy=objective.logprob, noise_TD=noise_TD) as outputs:
                loss, metrics = objective.loss(outputs, tree, totals)
                if backward:
                    loss.backward()
            sums.add("loss", loss.detach(), count=0.0)
            sums.add("tokens", torch.tensor(float(len(tree.target_N))), count=0.0)
            for name, values in ({"entropy": outputs.entropy_N} | metrics).items():
                sums.add(name, values)
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
        return [name for name in self._parameters if samples and (self.network.bank is None or name in written)]


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


def build_optimizer(groups: Iterable[Sequence[Parameter]], optimization: Optimization) -> torch.optim.Optimizer:
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
