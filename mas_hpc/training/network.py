"""A model with what is attached to it, and its one call: a TokenTree in, log-probabilities and scores out.

Legend: T tree tokens, N trained tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from mas_hpc_kernels import linear_logprob
from torch import Tensor
from transformers import PreTrainedModel

from mas_hpc.data.token_tree import Scope, TokenTree, pack, split
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import hidden_states, scaled_logits
from mas_hpc.models.flex_attention import tree_attention
from mas_hpc.models.heads import ScalarHead
from mas_hpc.training.share import share
from mas_hpc.types import Sample


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one forward pass gives at the predictors; a tensor that was not asked for is empty."""

    logprob_N: Tensor
    """Natural log-probability of the target."""
    entropy_N: Tensor
    """Nats; carries no gradient."""
    score_N: Tensor
    """The scalar head's: value of the state before the target, or reward of what ends there."""


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
    checkpointing: bool = False
    """Compute activations again in the backward pass; the model was prepared for it (models.load.checkpoint_activations)."""

    def forests(self, samples: Sequence[Sample], *, whole: bool = False) -> Iterator[tuple[list[Sample], TokenTree]]:
        """Pack the samples into forests of at most `max_tree_tokens`; `whole` never divides a tree, however large."""
        adapters = self.bank.index if self.bank else {}
        for part in split(samples, max_tokens=self.max_tree_tokens, adapters=adapters, scope=self.scope, whole=whole):
            yield part, pack(part, adapters=adapters, scope=self.scope).to(self.model.device)

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
        attend = tree_attention(tree.leave_T, device=tree.leave_T.device)
        route = nullcontext() if self.bank is None else self.bank.route(None if base else tree.adapter_T)
        with route, self._training_mode():
            hidden_TD = hidden_states(self.model, tree.token_T, tree.position_T, attend, noise_TD=noise_TD)
            hidden_ND = hidden_TD[tree.predictor_N]
            empty = hidden_ND.new_empty(0)
            logprob_N, entropy_N = (
                linear_logprob(
                    hidden_ND, head_weight(self.model), tree.target_N, temperature=self.temperature, need_entropy=entropy
                )
                if logprob
                else (empty, None)
            )
            yield Outputs(
                logprob_N=logprob_N,
                entropy_N=empty if entropy_N is None else entropy_N,
                score_N=empty if self.head is None else self.head(hidden_ND),
            )

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
        mine = share(numbered, world.rank, world.size)
        for part, tree in self.forests(mine):
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
