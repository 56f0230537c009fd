"""The critic's loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.value import value_loss


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    value, old, target = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(3))
    return value.requires_grad_(), old, target


def test_g29_value_clip() -> None:
    value = _tensor(1.0).requires_grad_()
    loss, metrics = value_loss(value, _tensor(0.5), _tensor(2.0), num_tokens=1, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.845)
    assert value.grad.item() == 0.0  # the clipped value, .7, does not move
    assert metrics["value/clip_ratio"].tolist() == [1.0] and metrics["value/error"].tolist() == [1.0]
    assert metrics["value/mean"].tolist() == [1.0] and not metrics["value/mean"].requires_grad


def test_inside_the_bounds_nothing_is_clipped() -> None:
    value = _tensor(0.6).requires_grad_()
    loss, metrics = value_loss(value, _tensor(0.5), _tensor(2.0), num_tokens=2, clip=0.2)
    loss.backward()
    assert (loss.item(), value.grad.item()) == pytest.approx((0.5 * 1.96 / 2, -1.4 / 2))
    assert metrics["value/clip_ratio"].tolist() == [0.0]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_random_values_agree_with_plain_loops_and_finite_differences(clip: float | None) -> None:
    value, old, target = _batch()
    expected, clipped = 0.0, 0
    for v, o, r in zip(value.tolist(), old.tolist(), target.tolist(), strict=True):
        held = v if clip is None else max(o - clip, min(v, o + clip))
        expected += 0.5 * max((v - r) ** 2, (held - r) ** 2) / 30
        clipped += (held - r) ** 2 > (v - r) ** 2
    loss, metrics = value_loss(value, old, target, num_tokens=30, clip=clip)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["value/clip_ratio"].sum() == clipped and (clipped > 0) == (clip is not None)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, target, num_tokens=30, clip=clip)[0], value)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_g5_value_loss_adds_up_over_micro_batches(clip: float | None, check_additive) -> None:
    value, old, target = _batch()

    def share(rows: Tensor) -> Tensor:
        return value_loss(value[rows], old[rows], target[rows], num_tokens=12, clip=clip)[0]

    check_additive(share, [value], torch.arange(12))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_extreme_values_stay_finite(clip: float | None) -> None:
    value = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    loss, _ = value_loss(value, torch.tensor([0.0, 0.0, 1e4]), torch.tensor([-1e4, 1e4, 0.0]), num_tokens=3, clip=clip)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and value.grad.isfinite().all()
