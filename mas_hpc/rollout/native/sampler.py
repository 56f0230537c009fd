"""Draw one token a row by inverse CDF, with the log-prob of the distribution that was drawn from.

One uniform a token, drawn from the request's own stream: what else is in the batch changes nothing, and no noise of
vocabulary size is made (torch.multinomial costs more than ten times as much). The cumulative sum is of blocks of the
vocabulary first and then within one block; top-k and top-p look at the most likely tokens only, unless these do not suffice.
Legend: B rows, V vocabulary, N blocks of S tokens, R rows that truncate, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mas_hpc.rollout.engine import SamplingParams

BLOCK = 128
"""Tokens of the vocabulary that are summed in the precision of the probabilities; above that sums are in float64."""
CANDIDATES = 256
"""Most likely tokens that top-k and top-p look at first: to sort the whole vocabulary costs 20 times as much."""
WIDER = 16
"""Times as many are looked at where these do not suffice."""
BELOW_ONE = 1 - 2**-30
"""Largest uniform: times the rounded sum of all probabilities it stays below that sum."""


def uniforms(seed: int, count: int, generator: torch.Generator) -> list[float]:
    """The stream of a request: `count` numbers in [0, 1), a function of the low 32 bits of `seed` alone."""
    drawn = torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64)
    return [min(value, BELOW_ONE) for value in drawn.tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """The sampling parameters of a batch, as columns. Greedy rows have temperature 1 and no truncation here."""

    greedy_B1: Tensor | None
    """None when no row is greedy."""
    temperature_B1: Tensor | None
    """None when all are 1."""
    truncation: Truncation | None
    """None when no row truncates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Rows that truncate, and how; a `top_k` as large as the vocabulary and a `top_p` of 1 keep everything."""

    row_R: Tensor
    top_k_R1: Tensor
    top_p_R1: Tensor

    def select(self, chosen_R: Tensor) -> Truncation:
        """Some of the rows."""
        return Truncation(
            row_R=self.row_R[chosen_R], top_k_R1=self.top_k_R1[chosen_R], top_p_R1=self.top_p_R1[chosen_R]
        )  # fmt: skip


def columns(rows: Sequence[SamplingParams], device: torch.device, vocabulary: int) -> SamplingColumns:
    """Lay out the parameters of the rows of a batch."""
    greedy = [params.temperature == 0 for params in rows]
    temperature = [params.temperature or 1.0 for params in rows]
    top_k = [min(params.top_k or vocabulary, vocabulary) for params in rows]
    cut = [i for i, params in enumerate(rows) if params.temperature and (top_k[i] < vocabulary or params.top_p < 1)]
    return SamplingColumns(
        greedy_B1=torch.tensor(greedy, device=device)[:, None] if any(greedy) else None,
        temperature_B1=torch.tensor(temperature, device=device, dtype=torch.float64)[:, None]
        if set(temperature) != {1.0}
        else None,
        truncation=Truncation(
            row_R=torch.tensor(cut, device=device),
            top_k_R1=torch.tensor([top_k[i] for i in cut], device=device)[:, None],
            top_p_R1=torch.tensor([rows[i].top_p for i in cut], device=device, dtype=torch.float64)[:, None],
        )
        if cut
        else None,
    )


def sample(logits_BV: Tensor, params: SamplingColumns, uniform_B: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return the drawn tokens and their log-probs (natural log) after temperature, top-k and top-p.

    A log-prob is nan where the logits are not finite.
    """
    if logits_BV.dtype != torch.float64:
        logits_BV = logits_BV.float()
    if params.temperature_B1 is not None:
        logits_BV = logits_BV / params.temperature_B1.to(logits_BV.dtype)
    probability_BV = logits_BV.softmax(-1)
    if params.truncation is not None:
        truncate_(probability_BV, logits_BV, params.truncation)
    token_B1, total_B1 = _inverse_cdf(probability_BV, uniform_B)
    if params.greedy_B1 is not None:
        token_B1 = logits_BV.argmax(-1, keepdim=True).where(params.greedy_B1, token_B1)
    # The sum of the blocks is more exact than the one that softmax divided by.
    logprob_B1 = (probability_BV.gather(1, token_B1).double() / total_B1).log()
    return token_B1[:, 0].tolist(), logprob_B1[:, 0].tolist()


def truncate_(probability_BV: Tensor, logits_BV: Tensor, truncation: Truncation, *, num_candidates: int = CANDIDATES) -> None:
    """Zero the probabilities outside the top k and the smallest set of these whose renormalised sum reaches top p.

    `probability_BV` is softmax(`logits_BV`) and not renormalised. Of equal logits the lowest tokens are kept. Rows for
    which the most likely `num_candidates` do not tell are looked at with WIDER times as many.
    """
    threshold_R, num_tied_R, settled_R = _thresholds(probability_BV, logits_BV, truncation, num_candidates)
    threshold_B1 = logits_BV.new_full((len(logits_BV), 1), -torch.inf)
    threshold_B1[truncation.row_R, 0] = threshold_R.masked_fill(~settled_R, -torch.inf)
    probability_BV.masked_fill_(logits_BV < threshold_B1, 0.0)
    tied_R = ((num_tied_R >= 0) & settled_R).nonzero()[:, 0]
    if len(tied_R):
        row = truncation.row_R[tied_R]
        is_tie_RV = logits_BV[row] == threshold_R[tied_R, None]
        beyond_RV = is_tie_RV & (is_tie_RV.cumsum(-1) > num_tied_R[tied_R, None])
        probability_BV[row] = probability_BV[row].masked_fill_(beyond_RV, 0.0)
    if not settled_R.all():
        truncate_(probability_BV, logits_BV, truncation.select(~settled_R), num_candidates=WIDER * num_candidates)


def _thresholds(
    probability_BV: Tensor, logits_BV: Tensor, truncation: Truncation, num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest logit that a row keeps; how many such, if not all (else -1); whether the candidates tell. [R] each.

    Only values are compared, never the places that a selection gives to equal ones: their order is undefined.
    """
    vocabulary = logits_BV.shape[1]
    num_candidates = min(num_candidates, vocabulary)
    value_RC, token_RC = logits_BV[truncation.row_R].topk(num_candidates)
    weight_RC = (value_RC.double() - value_RC[:, :1].double()).exp()
    sum_RC = weight_RC.cumsum(-1)
    total_R1 = sum_RC.gather(1, truncation.top_k_R1.clamp(max=num_candidates) - 1)
    takes_all_R1 = truncation.top_k_R1 == vocabulary
    if takes_all_R1.any():
        probability_RV = probability_BV[truncation.row_R]
        all_R1 = _block_sums(probability_RV).sum(-1, keepdim=True) / probability_RV.gather(1, token_RC[:, :1]).double()
        total_R1 = all_R1.where(takes_all_R1, total_R1)
    rank_C = torch.arange(num_candidates, device=logits_BV.device)
    reached_RC = (sum_RC - weight_RC >= truncation.top_p_R1 * total_R1) & (truncation.top_p_R1 < 1)
    # The most likely token always stays, whatever rounding makes of the sum above it.
    kept_RC = (rank_C < truncation.top_k_R1) & (~reached_RC | (rank_C == 0))
    num_kept_R1 = kept_RC.sum(-1, keepdim=True)
    threshold_R1 = value_RC.gather(1, num_kept_R1 - 1)
    has_equals_R1 = value_RC.gather(1, num_kept_R1.clamp(max=num_candidates - 1)) == threshold_R1
    num_tied_R1 = num_kept_R1 - (value_RC > threshold_R1).sum(-1, keepdim=True)
    # The candidate after the last one kept tells whether that one has equals.
    settled_R1 = (num_kept_R1 < num_candidates) & (takes_all_R1 | (truncation.top_k_R1 < num_candidates))
    settled_R1 |= num_candidates == vocabulary
    return threshold_R1[:, 0], num_tied_R1.where(has_equals_R1, -1)[:, 0], settled_R1[:, 0]


def _inverse_cdf(probability_BV: Tensor, uniform_B: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds the uniform, so none of probability 0; and their sum; [B, 1]."""
    last = probability_BV.shape[1] - 1
    sum_BN = pad(_block_sums(probability_BV).cumsum(-1), (1, 0))
    uniform_B1 = torch.tensor(uniform_B, device=sum_BN.device, dtype=torch.float64)[:, None]
    target_B1 = uniform_B1 * sum_BN[:, -1:]
    block_B1 = (torch.searchsorted(sum_BN, target_B1, right=True) - 1).clamp_(0, sum_BN.shape[1] - 2)
    token_BS = block_B1 * BLOCK + torch.arange(BLOCK, device=sum_BN.device)
    within_BS = probability_BV.gather(1, token_BS.clamp(max=last)).double().masked_fill_(token_BS > last, 0.0).cumsum(-1)
    # A block is not exactly the sum of its tokens in order, so what is left of the target may exceed it by rounding.
    left_B1 = (target_B1 - sum_BN.gather(1, block_B1)).minimum(within_BS[:, -1:] * BELOW_ONE)
    token_B1 = block_B1 * BLOCK + torch.searchsorted(within_BS, left_B1, right=True)
    return token_B1.clamp_(max=last), sum_BN[:, -1:]


def _block_sums(probability_BV: Tensor) -> Tensor:
    """Sums of BLOCK neighbours, the last of what is left over, [B, N] in float64."""
    whole = probability_BV.shape[1] // BLOCK * BLOCK
    sums = [probability_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < probability_BV.shape[1]:
        sums.append(probability_BV[:, whole:].sum(-1, keepdim=True))
    return torch.cat(sums, 1).double()
