"""One optimizer step from samples: pack -> forward -> loss -> backward -> sum over ranks -> clip -> step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from mas_hpc.config import Optimization
from mas_hpc.data.token_tree import pack, split
from mas_hpc.distributed.strategy import Strategy
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.training.forward import forward
from mas_hpc.training.methods import Loss
from mas_hpc.types import Sample


class Learner:
    """Owns the optimizer. Policies are parameter groups: their gradients are clipped, and idle ones left alone, one by one."""

    def __init__(
        self, model: PreTrainedModel, bank: AdapterBank | None, strategy: Strategy, optimization: Optimization,
        *, scope: Literal["sequence", "speaker"], max_tree_tokens: int, temperature: float = 1.0, updates_per_batch: int = 1,
    ) -> None:  # fmt: skip
        self._model, self._bank, self._strategy, self._optimization = model, bank, strategy, optimization
        self._scope, self._max_tree_tokens, self._temperature = scope, max_tree_tokens, temperature
        self._parameters = policy_parameters(model, bank)
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in self._parameters.values()],
            lr=optimization.learning_rate, betas=(optimization.beta1, optimization.beta2),
            weight_decay=optimization.weight_decay, fused=True,
        )  # fmt: skip
        self._updates_per_batch = updates_per_batch  # the schedule counts batches
        self._num_updates = 0

    def update(self, samples: Sequence[Sample], loss: Loss, *, num_tokens: int) -> dict[str, float]:
        """Take one step on `samples`, which are the same on every rank; `num_tokens` is the global denominator.

        Returns loss, entropy (nats per trained token), grad_norm (before clipping), learning_rate, and the loss's own means.
        """
        self._optimizer.zero_grad(set_to_none=True)
        sums = self._backward(share(samples, self._strategy.world.rank, self._strategy.world.size), loss, num_tokens)
        active = self._active(samples)
        self._strategy.sum_gradients([parameter for policy in active for parameter in self._parameters[policy]])
        totals = self._strategy.sum(sums)
        learning_rate = self._optimization.learning_rate * schedule(
            self._optimization, self._num_updates // self._updates_per_batch
        )
        norms = [
            float(torch.nn.utils.clip_grad_norm_(self._parameters[policy], self._optimization.max_grad_norm))
            for policy in active
        ]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._num_updates += 1
        trained = max(totals.pop("tokens"), 1.0)
        means = {name: total if name == "loss" else total / trained for name, total in totals.items()}
        return means | {"grad_norm": max(norms, default=0.0), "learning_rate": learning_rate, "tokens": trained}

    def _backward(self, samples: Sequence[Sample], loss: Loss, num_tokens: int) -> dict[str, float]:
        """Accumulate gradients over the forests of this rank; return sums over its trained tokens."""
        sums: dict[str, float] = defaultdict(float)
        sums |= {"loss": 0.0, "tokens": 0.0, "entropy": 0.0}
        adapters = self._bank.index if self._bank else {}
        for part in split(samples, max_tokens=self._max_tree_tokens, adapters=adapters, scope=self._scope):
            tree = pack(part, adapters=adapters, scope=self._scope).to(self._model.device)
            logprob_N, entropy_N = forward(self._model, tree, bank=self._bank, temperature=self._temperature, need_entropy=True)
            value, extra = loss(logprob_N, tree, num_tokens=num_tokens)
            value.backward()
            sums["loss"] += value.item()
            sums["tokens"] += len(logprob_N)
            sums["entropy"] += entropy_N.sum().item() if entropy_N is not None else 0.0
            for name, total in extra.items():
                sums[name] += total.item()
        return sums

    def _active(self, samples: Sequence[Sample]) -> list[str]:
        """Policies that write a trained token. The others' gradients stay None, so that AdamW leaves them where they are."""
        if self._bank is None:
            return list(self._parameters) if samples else []
        written = {sample.policy for sample in samples}
        return [policy for policy in self._parameters if policy in written]


def policy_parameters(model: PreTrainedModel, bank: AdapterBank | None) -> dict[str, list[Parameter]]:
    """What each policy trains: its adapter, or all weights of the shared model."""
    if bank is None:
        return {"shared": [parameter for parameter in model.parameters() if parameter.requires_grad]}
    return {policy: bank.parameters_of(policy) for policy in bank.policies}


def schedule(optimization: Optimization, step: int) -> float:
    """Factor on the peak rate: linear warm-up, constant, then linear decay to min_ratio over the last decay_fraction."""
    warmup = min(1.0, (step + 1) / (optimization.warmup_steps + 1))
    decay_steps = max(1.0, optimization.decay_fraction * optimization.steps)
    left = min(1.0, max(0.0, (optimization.steps - step) / decay_steps))
    return warmup * (optimization.min_ratio + (1 - optimization.min_ratio) * left)


def share(samples: Sequence[Sample], rank: int, size: int) -> list[Sample]:
    """This rank's trees: largest first, each to the rank with the fewest tokens so far. The same answer on every rank."""
    if size == 1:
        return list(samples)
    trees: Mapping[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        trees[sample.tree].append(sample)
    cost = {
        name: max(len(s.prompt_ids) for s in tree) + sum(len(s.completion_ids) for s in tree) for name, tree in trees.items()
    }
    load = [0] * size
    mine = []
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        target = load.index(min(load))
        load[target] += cost[name]
        if target == rank:
            mine += trees[name]
    return mine
