"""Losses against numbers worked out by hand, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from mas_hpc.training.losses.policy_gradient import clipped_policy_loss
from mas_hpc.training.losses.sft import nll_loss


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "moves"),
    [
        (1.0, 1.5, -1.2, False),
        (-1.0, 0.5, 0.8, False),
        (-1.0, 5.0, 5.0, True),
        (1.0, 1.1, -1.1, True),
        (1.0, 0.5, -0.5, True),
    ],
)
def test_g28_clip(advantage: float, ratio: float, loss: float, moves: bool) -> None:
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value, _ = clipped_policy_loss(
        logprob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64),
        num_tokens=1, clip_low=0.2, clip_high=0.2,
    )  # fmt: skip
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprob.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0)


def test_g14_on_policy_the_ratio_is_one_and_the_gradient_is_the_advantage() -> None:
    logprob = torch.tensor([-0.3, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    value, sums = clipped_policy_loss(logprob, logprob.detach(), advantage, num_tokens=5, clip_low=0.2, clip_high=0.2)
    value.backward()
    assert (sums["ratio"].item(), sums["clip_ratio"].item(), sums["behavior_kl"].item()) == (3.0, 0.0, 0.0)
    torch.testing.assert_close(logprob.grad, -advantage / 5)


def test_an_extreme_ratio_keeps_the_gradient_finite() -> None:
    logprob = torch.tensor([0.0], requires_grad=True)
    value, _ = clipped_policy_loss(
        logprob, torch.tensor([-1e4]), torch.tensor([1.0]), num_tokens=1, clip_low=0.2, clip_high=0.2
    )
    value.backward()
    assert math.isfinite(value.item()) and math.isfinite(logprob.grad.item())


def test_g1_the_mean_is_over_all_tokens_not_over_micro_batches() -> None:
    # 2 tokens of mean 1 and 6 of mean 3: 20 / 8 = 2.5; a mean of means would give 2.0
    first, second = torch.full((2,), -1.0), torch.full((6,), -3.0)
    total = nll_loss(first, num_tokens=8) + nll_loss(second, num_tokens=8)
    assert total.item() == pytest.approx(2.5)


def test_policy_gradient_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logprob = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    behavior, advantage = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, behavior, advantage, num_tokens=6, clip_low=0.2, clip_high=0.3)[0], logprob
    )
