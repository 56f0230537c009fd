"""KTO."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.kto import kto_loss


def _loss(log_ratio: Tensor, desirable: Tensor, kl: Tensor, num_samples: int) -> Tensor:
    return kto_loss(log_ratio, desirable, kl, beta=0.3, desirable_weight=1.2, undesirable_weight=0.8, num_samples=num_samples)[
        0
    ]


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = torch.randn(9, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 3
    return log_ratio.requires_grad_(), torch.arange(9) % 3 == 0, torch.tensor(0.6, dtype=torch.float64)


@pytest.mark.parametrize(("log_ratio", "desirable", "loss"), [(1.0, True, 0.480011), (-1.0, False, 0.470036)])
def test_g36_kto(log_ratio: float, desirable: bool, loss: float) -> None:
    value, metrics = kto_loss(
        torch.tensor([log_ratio], dtype=torch.float64), torch.tensor([desirable]), torch.tensor(0.2, dtype=torch.float64),
        beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, num_samples=1,
    )  # fmt: skip
    assert value.item() == pytest.approx(loss, abs=5e-7)
    mine, other = ("rewards/chosen", "rewards/rejected") if desirable else ("rewards/rejected", "rewards/chosen")
    assert metrics[mine].tolist() == pytest.approx([0.1 * log_ratio])
    assert metrics[other].numel() == 0 and metrics["kl"].tolist() == pytest.approx([0.2])


def test_g36_the_kl_is_not_negative_and_gets_no_gradient() -> None:
    log_ratio, desirable, _ = _batch()
    kl = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    value = _loss(log_ratio, desirable, kl, 9)
    torch.testing.assert_close(value, _loss(log_ratio, desirable, torch.zeros((), dtype=torch.float64), 9))
    value.backward()
    assert kl.grad is None


@pytest.mark.parametrize("desirable", [True, False])
def test_g36_a_part_with_one_class_or_nothing_is_no_trouble(desirable: bool) -> None:
    log_ratio, _, kl = _batch()
    assert _loss(log_ratio, torch.full((9,), desirable), kl, 9).isfinite()
    assert _loss(log_ratio[:0], torch.full((0,), desirable), kl, 9).item() == 0.0


def test_random_samples_agree_with_plain_loops_and_finite_differences() -> None:
    log_ratio, desirable, kl = _batch()
    expected = 0.0
    for x, good in zip(log_ratio.tolist(), desirable.tolist(), strict=True):
        sign, weight = (1, 1.2) if good else (-1, 0.8)
        expected += weight * (1 - 1 / (1 + math.exp(-sign * 0.3 * (x - 0.6))))
    assert _loss(log_ratio, desirable, kl, 11).item() == pytest.approx(expected / 11, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: _loss(x, desirable, kl, 11), log_ratio)


def test_g5_kto_adds_up_over_micro_batches(check_additive) -> None:
    log_ratio, desirable, kl = _batch()
    check_additive(lambda rows: _loss(log_ratio[rows], desirable[rows], kl, 9), [log_ratio], torch.arange(9))


def test_extreme_log_ratios_stay_finite() -> None:
    log_ratio = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    value = _loss(log_ratio, torch.tensor([True, True, False, False]), torch.tensor(1e4), 4)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and log_ratio.grad.isfinite().all()
