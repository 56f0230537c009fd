"""The contract of every backend: a problem in, statistics of its logits out, and gradients from those.

logits = softcap(hidden @ weight.T + bias) / temperature, with softcap(x) = cap * tanh(x / cap) where there is a cap.
Legend: N targets, V vocabulary (of this shard), D hidden, S parts of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

NEGLIGIBLE = -1e30
"""What a backend reads instead of a logit of -inf: its exponential is 0, and its product with 0 is 0 rather than nan."""

Reduction = Callable[[Tensor, Literal["max", "sum"]], Tensor]
"""Combine a tensor of equal shape on all ranks of the head, element by element, and return the result on each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyShard:
    """The rows of the head that this rank holds; the others are on other ranks, which make the same calls.

    Hidden states and targets are whole and the same everywhere; so are the results and the gradient of the hidden states.
    Example: VocabularyShard(start=24576, reduce=reduce) on the second of two ranks that share 49152 rows.
    """

    start: int
    """Token id of the first row held here."""
    reduce: Reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """How logits differ from hidden @ weight.T, temperature apart.

    Example: LogitRule(softcap=30.0) for Gemma 2; LogitRule(bias_V=torch.zeros(49152).index_fill(0, unused, -torch.inf))
    for a vocabulary of which some ids are never to be predicted.
    """

    bias_V: Tensor | None = None
    """Added to the logits before the cap; -inf takes a token out of the vocabulary, and goes with no cap."""
    softcap: float = 0.0
    """Logits saturate at plus and minus this; 0: they do not."""
    shard: VocabularyShard | None = None
    """The part of the head that is here; None: all of it."""


PLAIN = LogitRule()
"""Logits are hidden @ weight.T, and the whole head is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call as a backend sees it.

    Example: Problem(hidden_ND=h, weight_VD=w, target_N=y, bias_V=None, softcap=0.0, inverse_temperature=1.0)
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    """Row of the weight, int64; outside [0, V) where another shard has it."""
    bias_V: Tensor | None
    softcap: float
    inverse_temperature: float
    kept: list[Tensor] | None = None
    """Where a backend's statistics may leave what spares its gradients work; None: no gradients will be asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and of gradients before they are cast: float64 for float64 inputs, else float32."""
        return torch.promote_types(self.hidden_ND.dtype, torch.float32)


class Statistics(NamedTuple):
    """What a row's softmax is made of, over the vocabulary or a part of it; all [N] in Problem.dtype."""

    max_N: Tensor
    """Largest logit."""
    sum_N: Tensor
    """Sum of exp(logit - max)."""
    weighted_N: Tensor
    """Sum of (logit - max) exp(logit - max); 0 where no entropy is needed."""
    target_N: Tensor
    """The target's logit; 0 where the target is in another part."""

    @classmethod
    def empty(cls, problem: Problem) -> Statistics:
        """Those of no vocabulary at all."""
        zero_N = torch.zeros(len(problem.hidden_ND), dtype=problem.dtype, device=problem.hidden_ND.device)
        return cls(torch.full_like(zero_N, NEGLIGIBLE), zero_N, zero_N.clone(), zero_N.clone())

    @property
    def logprob_N(self) -> Tensor:
        """The target's log-probability."""
        return (self.target_N - self.max_N) - self.sum_N.log()

    @property
    def entropy_N(self) -> Tensor:
        """Nats."""
        return self.sum_N.log() - self.weighted_N / self.sum_N


class Upstream(NamedTuple):
    """d loss / d results, [N] in Problem.dtype."""

    logprob_N: Tensor
    entropy_N: Tensor | None
    """None: the entropy is a metric."""


class Gradients(NamedTuple):
    """d loss / d inputs in Problem.dtype; the head's are None unless they were needed, the bias's also where there is none."""

    hidden_ND: Tensor
    """Of this part of the vocabulary; the sum over parts is the gradient."""
    weight_VD: Tensor | None
    bias_V: Tensor | None


class Backend(Protocol):
    """A module with these functions, which know nothing of autograd or of other shards."""

    def statistics(self, problem: Problem, *, need_entropy: bool) -> Statistics:
        """Statistics of the rows of this shard."""

    def gradients(self, problem: Problem, whole: Statistics, upstream: Upstream, *, need_head: bool) -> Gradients:
        """Gradients through the logits of this shard; `whole` are the statistics of the whole vocabulary.

        With p = exp(logit - max) / sum, mean = weighted / sum, a row has
        d loss / d logit = logprob_N (onehot - p) - entropy_N p ((logit - max) - mean).
        """


class FrozenBackend(Backend, Protocol):
    """A backend that needs the logits only once where the head is frozen."""

    def statistics_and_slope(
        self, problem: Problem, shard: VocabularyShard | None, *, need_entropy: bool
    ) -> tuple[Statistics, Tensor]:
        """Statistics of the whole vocabulary and d logprob / d hidden, [N, D] in Problem.dtype, summed over shards."""


def merge(parts: Statistics, shard: VocabularyShard | None) -> Statistics:
    """Statistics of the whole vocabulary from those of this shard. Collective over the ranks of the head."""
    if shard is None:
        return parts
    max_N = shard.reduce(parts.max_N.clone(), "max")
    return Statistics(max_N, *shard.reduce(torch.stack(_rescaled(parts, max_N)), "sum").unbind())


def merge_parts(parts_SN: Statistics) -> Statistics:
    """Statistics of the whole vocabulary from those of its parts, [S, N] each."""
    max_N = parts_SN.max_N.amax(0)
    return Statistics(max_N, *(values_SN.sum(0) for values_SN in _rescaled(parts_SN, max_N)))


def _rescaled(parts: Statistics, max_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, weighted sum and target of parts, relative to another maximum."""
    shift = parts.max_N - max_N
    scale = shift.exp()
    return parts.sum_N * scale, (parts.weighted_N + parts.sum_N * shift) * scale, parts.target_N
