"""Policy-gradient losses against numbers worked out by hand, plain loops and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.aggregate import aggregate
from mas_hpc.training.losses.policy_gradient import Clip, policy_loss

CLIP = Clip(low=0.2, high=0.2)
RATIOS = ["token", "sequence", "cispo"]
SAMPLE = torch.tensor([0, 0, 1, 3, 3, 3, 4, 4, 4, 4, 5, 5])  # sample 2 has no trained token


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, weights of 12 tokens, and one advantage a sample, spread over its tokens."""
    generator = torch.Generator().manual_seed(2)
    logprob, old = (-torch.rand(12, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2))
    weight = torch.rand(12, generator=generator, dtype=torch.float64) * 2
    advantage = _tensor(1.0, -0.7, 0.0, -1.5, 0.8, -0.4)[SAMPLE]
    return logprob.requires_grad_(), old, weight, advantage


def _single(advantage: float, ratio: float, kind: str = "token", clip: Clip = CLIP) -> tuple[float, float, dict[str, Tensor]]:
    logprob = _tensor(math.log(ratio)).requires_grad_()
    sample = torch.zeros(1, dtype=torch.long)
    loss, metrics = policy_loss(logprob, _tensor(0.0), _tensor(advantage), sample, 1, ratio=kind, clip=clip)
    loss.sum().backward()
    return loss.item(), logprob.grad.item(), metrics


def _plain(logprob: list[float], old: list[float], advantage: list[float], kind: str, clip: Clip) -> list[float]:
    samples = SAMPLE.tolist()
    gap = [p - o for p, o in zip(logprob, old, strict=True)]
    losses = []
    for i, (p, a) in enumerate(zip(logprob, advantage, strict=True)):
        members = [g for g, s in zip(gap, samples, strict=True) if s == samples[i]]
        ratio = math.exp(sum(members) / len(members) if kind == "sequence" else gap[i])
        held = max(1 - clip.low, min(ratio, 1 + clip.high))
        surrogate = held * a * p if kind == "cispo" else min(ratio * a, held * a)
        if clip.dual is not None and a < 0:
            surrogate = max(surrogate, clip.dual * a)
        losses.append(-surrogate)
    return losses


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "moves", "region"),
    [
        (1.0, 1.5, -1.2, False, (0, 1, 1)),
        (-1.0, 0.5, 0.8, False, (1, 0, 1)),
        (-1.0, 5.0, 5.0, True, (0, 0, 0)),
        (1.0, 1.1, -1.1, True, (0, 0, 0)),
        (1.0, 0.5, -0.5, True, (0, 0, 0)),
    ],
)
def test_g28_clip(advantage: float, ratio: float, loss: float, moves: bool, region: tuple[int, int, int], kind: str) -> None:
    value, gradient, metrics = _single(advantage, ratio, kind)
    assert value == pytest.approx(loss)
    assert gradient == pytest.approx(-advantage * ratio if moves else 0.0)
    assert tuple(metrics[f"clip_ratio/{name}_mean"].item() for name in ("low", "high", "region")) == region
    assert metrics["ratio/mean"].item() == pytest.approx(ratio) and metrics["ratio/max"].item() == pytest.approx(ratio)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize(("advantage", "ratio", "loss", "moves"), [(-1, 5, 3, False), (-1, 2, 2, True), (1, 5, -1.2, False)])
def test_g28_dual_clip(advantage: float, ratio: float, loss: float, moves: bool) -> None:
    value, gradient, _ = _single(advantage, ratio, clip=Clip(low=0.2, high=0.2, dual=3.0))
    assert value == pytest.approx(loss)
    assert gradient == pytest.approx(-advantage * ratio if moves else 0.0)


def test_g28_clip_higher_has_its_own_bound() -> None:
    clip = Clip(low=0.2, high=0.28)
    assert _single(1.0, 1.5, clip=clip)[0] == pytest.approx(-1.28)
    assert _single(-1.0, 0.5, clip=clip)[0] == pytest.approx(0.8)


@pytest.mark.parametrize("kind", RATIOS)
def test_g14_on_policy_the_ratio_is_one_and_the_gradient_is_the_advantage(kind: str) -> None:
    logprob, _, _, advantage = _batch()
    loss, metrics = policy_loss(logprob, logprob.detach(), advantage, SAMPLE, 6, ratio=kind, clip=CLIP)
    loss.sum().backward()
    assert (metrics["ratio/mean"] == 1).all()
    assert (metrics["clip_ratio/region_mean"] == 0).all() and (metrics["approx_kl"] == 0).all()
    torch.testing.assert_close(logprob.grad, -advantage)
    if kind != "cispo":
        torch.testing.assert_close(loss.detach(), -advantage)


def test_g30_the_sequence_ratio_is_the_exponential_of_the_mean() -> None:
    logprob = _tensor(0.1, -0.2, 0.3).requires_grad_()
    sample, wide = torch.zeros(3, dtype=torch.long), Clip(low=0.5, high=0.5)
    loss, metrics = policy_loss(logprob, torch.zeros(3), torch.ones(3), sample, 1, ratio="sequence", clip=wide)
    assert metrics["ratio/mean"].tolist() == pytest.approx([1.068939] * 3, abs=5e-7)
    aggregate(loss, sample, 1, mode="sequence_mean", num_tokens=3, num_samples=1).backward()
    direct = _tensor(0.1, -0.2, 0.3).requires_grad_()
    (-direct.mean().exp()).backward()
    torch.testing.assert_close(logprob.grad, direct.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(5.0, 1.0, 1.2), (0.5, -1.0, 0.8), (5.0, -1.0, 1.2), (1.1, 1.0, 1.1)]
)
def test_g31_cispo_bounds_are_relative_to_one_and_every_token_has_a_gradient(
    ratio: float, advantage: float, weight: float
) -> None:
    value, gradient, _ = _single(advantage, ratio, "cispo")
    assert value == pytest.approx(-weight * advantage * math.log(ratio))
    assert gradient == pytest.approx(-weight * advantage)


def test_g31_cispo_with_high_four_reaches_a_ratio_of_five() -> None:
    assert _single(1.0, 100.0, "cispo", Clip(low=1.0, high=4.0))[1] == pytest.approx(-5.0)


def test_g32_mismatch_weights_multiply_outside_the_clip_and_get_no_gradient() -> None:
    logprob, old, weight, advantage = _batch()
    weight.requires_grad_()
    plain, _ = policy_loss(logprob, old, advantage, SAMPLE, 6, ratio="token", clip=CLIP)
    loss, _ = policy_loss(logprob, old, advantage, SAMPLE, 6, ratio="token", clip=CLIP, weight_N=weight)
    torch.testing.assert_close(loss, plain * weight)
    loss.sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize(
    ("kind", "clip"),
    [
        ("token", Clip(low=0.2, high=0.3)),
        ("token", Clip(low=0.2, high=0.3, dual=1.4)),
        ("sequence", Clip(low=0.05, high=0.06)),
        ("sequence", Clip(low=0.05, high=0.06, dual=1.1)),
        ("cispo", Clip(low=0.2, high=0.3)),
    ],
)
def test_random_tokens_agree_with_plain_loops(kind: str, clip: Clip) -> None:
    logprob, old, weight, advantage = _batch()
    loss, metrics = policy_loss(logprob, old, advantage, SAMPLE, 6, ratio=kind, clip=clip, weight_N=weight)
    plain = _plain(logprob.tolist(), old.tolist(), advantage.tolist(), kind, clip)
    assert loss.tolist() == pytest.approx([x * w for x, w in zip(plain, weight.tolist(), strict=True)], rel=1e-12)
    assert metrics["clip_ratio/low_mean"].sum() > 0 and metrics["clip_ratio/high_mean"].sum() > 0
    assert metrics["clip_ratio/region_mean"].sum() < 12


@pytest.mark.parametrize(
    ("kind", "mode", "clip"),
    [
        ("token", "token_mean", Clip(low=0.2, high=0.3)),
        ("token", "constant", Clip(low=0.2, high=0.3, dual=1.4)),
        ("sequence", "sequence_mean", Clip(low=0.05, high=0.06)),
        ("cispo", "token_mean", Clip(low=1e-9, high=1e-9)),  # held everywhere: the detached ratio does not move with x
    ],
)
def test_gradients_agree_with_finite_differences(kind: str, mode: str, clip: Clip) -> None:
    logprob, old, weight, advantage = _batch()
    weight = None if kind == "sequence" else weight  # constant over a sequence, or the paper's form does not hold

    def loss(logprob_N: Tensor) -> Tensor:
        loss_N, _ = policy_loss(logprob_N, old, advantage, SAMPLE, 6, ratio=kind, clip=clip, weight_N=weight)
        return aggregate(loss_N, SAMPLE, 6, mode=mode, num_tokens=12, num_samples=5, max_length=8)

    assert torch.autograd.gradcheck(loss, logprob)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "constant", "sequence_sum"])
@pytest.mark.parametrize("kind", RATIOS)
def test_g5_policy_losses_add_up_over_micro_batches(kind: str, mode: str, check_additive) -> None:
    logprob, old, weight, advantage = _batch()

    def share(rows: Tensor) -> Tensor:
        loss_N, _ = policy_loss(
            logprob[rows], old[rows], advantage[rows], SAMPLE[rows], 6, ratio=kind, clip=CLIP, weight_N=weight[rows]
        )
        return aggregate(loss_N, SAMPLE[rows], 6, mode=mode, num_tokens=12, num_samples=5, max_length=8)

    check_additive(share, [logprob], SAMPLE)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("kind", RATIOS)
def test_g17_extreme_ratios_stay_finite(kind: str, dual: float | None) -> None:
    dual = None if kind == "cispo" else dual
    logprob = torch.tensor([0.0, -1e4, 0.0, -1e4], requires_grad=True)
    old, advantage = torch.tensor([-1e4, 0.0, -1e4, 0.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    clip = Clip(low=0.2, high=0.2, dual=dual)
    loss, metrics = policy_loss(logprob, old, advantage, torch.arange(4), 4, ratio=kind, clip=clip)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and logprob.grad.isfinite().all()
    assert all(metric.isfinite().all() for metric in metrics.values())
