"""Reward models: pairs, outcomes, steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.reward_model import binary_loss, bradley_terry_loss


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _random(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("margin", "center", "loss"), [(None, 0.0, 0.371101), (0.5, 0.0, 0.554355), (None, 0.01, 0.371101 + 0.0144)]
)
def test_g33_bradley_terry(margin: float | None, center: float, loss: float) -> None:
    margin_P = None if margin is None else _tensor(margin)
    value, metrics = bradley_terry_loss(_tensor(1.0), _tensor(0.2), num_pairs=1, margin_P=margin_P, center_coefficient=center)
    assert value.item() == pytest.approx(loss, abs=5e-7)
    assert (metrics["accuracy"].item(), metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == (1, 1, 0.2)
    assert metrics["rewards/margins"].item() == pytest.approx(0.8)


def test_g33_equal_rewards_give_log_two_and_are_not_right() -> None:
    score = _tensor(0.7).requires_grad_()
    value, metrics = bradley_terry_loss(score, score, num_pairs=1)
    value.backward()
    assert value.item() == pytest.approx(math.log(2)) and score.grad.item() == 0.0
    assert metrics["accuracy"].item() == 0.0


def test_bradley_terry_agrees_with_plain_loops_and_finite_differences() -> None:
    chosen, rejected, margin = _random(9, 5), _random(9, 6), _random(9, 7).abs()
    expected = sum(
        math.log1p(math.exp(-(c - r - m))) + 0.05 * (c + r) ** 2
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
    )

    def loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return bradley_terry_loss(chosen_P, rejected_P, num_pairs=11, margin_P=margin, center_coefficient=0.05)[0]

    assert loss(chosen, rejected).item() == pytest.approx(expected / 11, rel=1e-12)
    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_g5_bradley_terry_adds_up_over_micro_batches(check_additive) -> None:
    chosen, rejected, margin = _random(9, 5).requires_grad_(), _random(9, 6).requires_grad_(), _random(9, 7)

    def share(rows: Tensor) -> Tensor:
        return bradley_terry_loss(chosen[rows], rejected[rows], num_pairs=9, margin_P=margin[rows], center_coefficient=0.05)[0]

    check_additive(share, [chosen, rejected], torch.arange(9))


def test_binary_loss_agrees_with_plain_loops_and_finite_differences() -> None:
    score, label = _random(9, 8), torch.tensor([0, 1, 1, 0, 0.25, 0.5, 0.9, 1, 0], dtype=torch.float64)
    expected = -sum(
        y * math.log(1 / (1 + math.exp(-s))) + (1 - y) * math.log(1 / (1 + math.exp(s)))
        for s, y in zip(score.tolist(), label.tolist(), strict=True)
    )
    value, metrics = binary_loss(score, label, num_items=12)
    assert value.item() == pytest.approx(expected / 12, rel=1e-12)
    right = [(s > 0) == (y > 0.5) for s, y in zip(score.tolist(), label.tolist(), strict=True)]
    assert metrics["accuracy"].tolist() == right
    assert torch.autograd.gradcheck(lambda x: binary_loss(x, label, num_items=12)[0], score.requires_grad_())


def test_binary_loss_is_cross_entropy_over_two_classes() -> None:
    score, label = _random(5, 9), torch.tensor([0, 1, 1, 0.3, 0.8], dtype=torch.float64)
    classes = torch.stack([torch.zeros_like(score), score], dim=1)
    target = torch.stack([1 - label, label], dim=1)
    expected = torch.nn.functional.cross_entropy(classes, target, reduction="sum") / 5
    torch.testing.assert_close(binary_loss(score, label, num_items=5)[0], expected)
    assert binary_loss(score, label.float(), num_items=5)[0].dtype == torch.float64


def test_g5_binary_loss_adds_up_over_micro_batches(check_additive) -> None:
    score, label = _random(9, 8).requires_grad_(), _random(9, 10).sigmoid()
    check_additive(lambda rows: binary_loss(score[rows], label[rows], num_items=9)[0], [score], torch.arange(9))


def test_extreme_scores_stay_finite() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    pair, _ = bradley_terry_loss(chosen, -chosen, num_pairs=2, center_coefficient=0.01)
    single, _ = binary_loss(chosen, torch.tensor([0.0, 1.0]), num_items=2)
    (pair + single).backward()
    assert pair.isfinite() and single.isfinite() and chosen.grad.isfinite().all() and pair.dtype == torch.float32
