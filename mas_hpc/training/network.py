"""A model with what is attached to it, and its one call: a TokenTree in, log-probabilities and scores out.

Legend: T tree tokens, N trained tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mas_hpc_kernels import BackendName, LogitRule, linear_logprob
from mas_hpc_kernels.operation import PLAIN
from torch import Tensor, nn
from transformers import PreTrainedModel

from mas_hpc.data.token_tree import Scope, TokenTree, pack, split
from mas_hpc.distributed.exchange import gather_lines, most
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import hidden_states, scaled_logits
from mas_hpc.models.flex_attention import tree_attention
from mas_hpc.models.heads import ScalarHead
from mas_hpc.training.share import share
from mas_hpc.types import Sample

FILLER = Sample(
    id="filler", tree="filler", agent="", policy="", prompt_ids=(0,), prompt_spans=(("", 1),), completion_ids=(0,)
)  # fmt: skip
"""What a rank passes through the model while others have work and it has none."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one forward pass gives at the predictors; a tensor that was not asked for is empty."""

    logprob_N: Tensor
    """Natural log-probability of the target."""
    entropy_N: Tensor
    """Nats; carries no gradient."""
    score_N: Tensor
    """The scalar head's: value of the state before the target, or reward of what ends there."""

    def nothing(self) -> Tensor:
        """A loss of zero that depends on everything here, so that its backward pass takes the usual way."""
        return 0.0 * (self.logprob_N.sum() + self.score_N.sum())


class TreeModule(nn.Module):
    """The one call as a module: what a strategy shards, and what its hooks see."""

    def __init__(self, model: PreTrainedModel, head: ScalarHead | None) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(
        self,
        tree: TokenTree,
        *,
        logprob: bool,
        entropy: bool,
        temperature: float,
        noise_TD: Tensor | None,
        kernels: BackendName,
        rule: LogitRule = PLAIN,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities, entropies and scores at the predictors, as in Outputs; None for what was not asked for."""
        attend = tree_attention(tree.leave_T, device=tree.leave_T.device)
        hidden_TD = hidden_states(self.model, tree.token_T, tree.position_T, attend, noise_TD=noise_TD)
        hidden_ND = hidden_TD[tree.predictor_N]
        logprob_N, entropy_N = None, None
        if logprob:
            logprob_N, entropy_N = linear_logprob(
                hidden_ND, head_weight(self.model), tree.target_N, temperature=temperature, need_entropy=entropy,
                backend=kernels, rule=rule,
            )  # fmt: skip
        return logprob_N, entropy_N, None if self.head is None else self.head(hidden_ND)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A prepared model (models.attention.prepare), the adapters and the scalar head on it, and the layout of its batches."""

    model: PreTrainedModel
    bank: AdapterBank | None = None
    head: ScalarHead | None = None
    scope: Scope = "sequence"
    max_tree_tokens: int = 16384
    """Of one forward and backward pass; larger batches are split into forests."""
    temperature: float = 1.0
    kernels: BackendName = "auto"
    """What computes log-probabilities from hidden states (kernels.backend)."""
    source: Path | None = None
    """Folder of the weights that a model on the meta device has not read yet (models.skeleton); None: it has them."""
    checkpointing: bool = False
    """Compute activations again in the backward pass; the model was prepared for it (models.load.checkpoint_activations)."""
    module: nn.Module | None = None
    """What a strategy has made of the model and the head, and a pass calls; None: they themselves."""
    rule: LogitRule = PLAIN
    """Which part of the vocabulary the LM head of `module` has."""
    lockstep: World | None = None
    """The ranks that hold parts of the weights, and so have to make the same number of passes; None: nobody waits for us."""

    def copy(self, weights: Mapping[str, Tensor] | None = None) -> Network:
        """The same weights again, adapters and head included; with `weights`, these in place of the model's, by their names."""
        own, given = dict(self.model.named_parameters()), weights or {}
        memo: dict[int, Any] = {
            id(own[name]): nn.Parameter(tensor, requires_grad=own[name].requires_grad) for name, tensor in given.items()
        }
        model, bank, head = deepcopy((self.model, self.bank, self.head), memo)
        return replace(self, model=model, bank=bank, head=head)

    def forests(self, samples: Sequence[Sample], *, whole: bool = False) -> Iterator[tuple[list[Sample], TokenTree]]:
        """Pack the samples into forests of at most `max_tree_tokens`; `whole` never divides a tree, however large.

        In lockstep a rank that has fewer forests than others gets ones of two tokens, and no samples, for the rest. Collective.
        """
        adapters = self.bank.index if self.bank else {}
        parts = split(samples, max_tokens=self.max_tree_tokens, adapters=adapters, scope=self.scope, whole=whole)
        for part in parts:
            yield part, pack(part, adapters=adapters, scope=self.scope).to(self.device)
        if self.lockstep:
            filler = pack([FILLER], adapters={}, scope=self.scope).to(self.device)
            yield from (([], filler) for _ in range(most(self.lockstep, len(parts)) - len(parts)))

    def share(self, samples: Sequence[Sample], world: World) -> list[Sample]:
        """What this rank passes through the model; ranks get trees of about the same cost."""
        by_policy = self.bank is not None and self.scope == "sequence"
        return share(samples, world.rank, world.size, hidden_size=self.model.config.hidden_size, by_policy=by_policy)

    @property
    def device(self) -> torch.device:
        """Where a pass runs."""
        return self.model.device

    @contextmanager
    def run(
        self, tree: TokenTree, *, logprob: bool = True, entropy: bool = False, base: bool = False,
        noise_TD: Tensor | None = None,
    ) -> Iterator[Outputs]:  # fmt: skip
        """Run the model over a forest. Call backward inside: recomputed activations need the adapters' route.

        `base` leaves the adapters out. Raises ConfigError for an LM head that is more than a matrix, and when the tree
        names an adapter but there is no bank.
        """
        if self.bank is None and int(tree.adapter_T.max()) >= 0:
            raise ConfigError(
                "the samples name an adapter, but the model has no adapter bank: build one or pack with adapters={}"
            )
        module = self.module or TreeModule(self.model, self.head)
        route = nullcontext() if self.bank is None else self.bank.route(None if base else tree.adapter_T)
        with route, self._training_mode():
            found = module(
                tree, logprob=logprob, entropy=entropy, temperature=self.temperature, noise_TD=noise_TD, kernels=self.kernels,
                rule=self.rule,
            )  # fmt: skip
            empty = torch.empty(0, dtype=self.model.dtype, device=self.device)
            logprob_N, entropy_N, score_N = (empty if values is None else values for values in found)
            yield Outputs(logprob_N=logprob_N, entropy_N=entropy_N, score_N=score_N)

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """transformers keeps all activations of a model that is not in training mode."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            yield
            return
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def annotate(
        self, samples: Sequence[Sample], world: World, *, column: str, read: Literal["logprob", "score"], base: bool = False
    ) -> list[Sample]:  # fmt: skip
        """Give every sample a column of log-probabilities or scores under the present weights, without gradient.

        nan where a completion token is masked out. Each rank computes its share; all ranks get all values. Collective.
        """
        found: dict[int, list[float]] = {}
        numbered = [replace(sample, id=str(number)) for number, sample in enumerate(samples) if sample.completion_ids]
        mine = self.share(numbered, world)
        for part, tree in self.forests(mine):
            world.watch.moved()
            with torch.no_grad(), self.run(tree, logprob=read == "logprob", base=base) as outputs:
                values = (outputs.logprob_N if read == "logprob" else outputs.score_N).tolist()
            for sample, size in zip(part, torch.bincount(tree.sample_N, minlength=len(part)).tolist(), strict=True):
                found[int(sample.id)], values = values[:size], values[size:]
        for line in gather_lines(world, [json.dumps(found)]):
            found |= {int(number): values for number, values in json.loads(line).items()}
        return [
            replace(sample, columns={**sample.columns, column: _spread(sample, found.get(number, []))})
            for number, sample in enumerate(samples)
        ]


def _spread(sample: Sample, values: Sequence[float]) -> tuple[float, ...]:
    """Values of the trained tokens, with nan at the masked ones."""
    if not sample.loss_mask:
        return tuple(values)
    remaining = iter(values)
    return tuple(next(remaining) if trained else math.nan for trained in sample.loss_mask)


def embedding_noise(tree: TokenTree, width: int, *, alpha: float, generator: torch.Generator) -> Tensor:
    """NEFTune (arXiv 2310.05914): uniform noise of size alpha / sqrt(L D) a token, [T, D]; L: longest path through it."""
    position_T, leave_T = tree.position_T.cpu().numpy(), tree.leave_T.cpu().numpy()
    longest_T = np.array([position_T[start:leave].max() + 1 for start, leave in enumerate(leave_T)])
    noise_TD = torch.rand(len(tree), width, generator=generator) * 2 - 1
    return noise_TD * (alpha / torch.from_numpy(longest_T * width).float().sqrt())[:, None]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The LM head's matrix, [V, D]. Raises ConfigError when logits are more than hidden @ weight.T."""
    head = model.get_output_embeddings()
    extra = scaled_logits(model.config)
    if getattr(head, "bias", None) is not None:
        extra.append("a bias")
    if extra:
        raise ConfigError(
            f"model.path: the LM head of {model.config.model_type} has {', '.join(extra)}; log-probabilities are "
            "computed from its matrix alone, so choose a model with a plain linear head"
        )
    return head.weight
