"""Draw one token a row by inverse CDF, with the log-prob of the distribution that was drawn from.

One uniform a token, drawn from the request's own stream: what else is in the batch changes nothing, and no noise of
vocabulary size is made (torch.multinomial costs more than ten times as much). Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_hpc.rollout.engine import SamplingParams

BELOW_ONE = 1 - 2**-30
"""Largest uniform: times the rounded sum of all probabilities it stays below that sum."""


def uniforms(seed: int, count: int, generator: torch.Generator) -> list[float]:
    """The stream of a request: `count` numbers in [0, 1), a function of the low 32 bits of `seed` alone."""
    drawn = torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64)
    return [min(value, BELOW_ONE) for value in drawn.tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """The sampling parameters of a batch, as columns. Greedy rows have temperature 1 and no truncation here."""

    greedy_B: Tensor | None
    """None when no row is greedy."""
    temperature_B1: Tensor | None
    """None when all are 1."""
    top_k_B1: Tensor | None
    """None, as top_p_B1, when no row truncates."""
    top_p_B1: Tensor | None


def columns(rows: Sequence[SamplingParams], device: torch.device, vocabulary: int) -> SamplingColumns:
    """Lay out the parameters of the rows of a batch."""
    greedy = [params.temperature == 0 for params in rows]
    temperature = [params.temperature or 1.0 for params in rows]
    top_k = [params.top_k if params.top_k and params.temperature else vocabulary for params in rows]
    top_p = [params.top_p if params.temperature else 1.0 for params in rows]
    truncates = min(top_k) < vocabulary or min(top_p) < 1
    return SamplingColumns(
        greedy_B=torch.tensor(greedy, device=device) if any(greedy) else None,
        temperature_B1=torch.tensor(temperature, device=device, dtype=torch.float64)[:, None]
        if set(temperature) != {1.0}
        else None,
        top_k_B1=torch.tensor(top_k, device=device)[:, None] if truncates else None,
        top_p_B1=torch.tensor(top_p, device=device, dtype=torch.float64)[:, None] if truncates else None,
    )


def sample(logits_BV: Tensor, params: SamplingColumns, uniform_B: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return the drawn tokens and their log-probs (natural log) after temperature, top-k and top-p.

    A log-prob is nan where the logits are not finite.
    """
    if logits_BV.dtype != torch.float64:
        logits_BV = logits_BV.float()
    if params.temperature_B1 is not None:
        logits_BV = logits_BV / params.temperature_B1.to(logits_BV.dtype)
    if params.top_k_B1 is not None and params.top_p_B1 is not None:
        logits_BV = truncate(logits_BV, params.top_k_B1, params.top_p_B1)
    logprob_BV = logits_BV.log_softmax(-1)
    token_B1 = _inverse_cdf(logprob_BV, uniform_B)
    if params.greedy_B is not None:
        token_B1 = logits_BV.argmax(-1, keepdim=True).where(params.greedy_B[:, None], token_B1)
    return token_B1[:, 0].tolist(), logprob_BV.gather(1, token_B1)[:, 0].tolist()


def truncate(logits_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor) -> Tensor:
    """Keep the top k and of these the smallest set whose renormalised probability reaches top p; the rest is -inf."""
    sorted_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    sorted_BV = sorted_BV.masked_fill(rank_V >= top_k_B1, -torch.inf)
    probability_BV = sorted_BV.softmax(-1, dtype=torch.float64)
    above_BV = probability_BV.cumsum(-1) - probability_BV
    # The most likely token always stays, whatever rounding makes of the sum above it.
    drop_BV = (above_BV >= top_p_B1) & (top_p_B1 < 1) & (rank_V > 0)
    return torch.empty_like(logits_BV).scatter_(1, index_BV, sorted_BV.masked_fill_(drop_BV, -torch.inf))


def _inverse_cdf(logprob_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform, so never one of probability 0; [B, 1]."""
    cdf_BV = logprob_BV.exp().cumsum(-1, dtype=torch.float64)
    uniform_B1 = torch.tensor(uniform_B, device=cdf_BV.device, dtype=torch.float64)[:, None]
    token_B1 = torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True)
    return token_B1.clamp_(max=logprob_BV.shape[1] - 1)
