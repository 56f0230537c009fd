"""Negative log-likelihood."""

from __future__ import annotations

import pytest
import torch

from mas_hpc.training.losses.sft import nll_loss


def test_g1_the_mean_is_over_all_tokens_not_over_micro_batches() -> None:
    # 2 tokens of mean 1 and 6 of mean 3: 20 / 8 = 2.5; a mean of means would give 2.0
    first, second = torch.full((2,), -1.0), torch.full((6,), -3.0)
    total = nll_loss(first, num_tokens=8) + nll_loss(second, num_tokens=8)
    assert total.item() == pytest.approx(2.5)


def test_g5_nll_shares_of_micro_batches_add_up(check_additive) -> None:
    logprob = torch.linspace(-3, -0.1, 9, dtype=torch.float64, requires_grad=True)
    check_additive(lambda rows: nll_loss(logprob[rows], num_tokens=9), [logprob], torch.arange(9))
    torch.testing.assert_close(logprob.grad, torch.full_like(logprob, -1 / 9))
    assert torch.autograd.gradcheck(lambda x: nll_loss(x, num_tokens=9), logprob)
