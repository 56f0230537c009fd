"""KL estimators: values, gradients, extremes."""

from __future__ import annotations

import math

import pytest
import torch

from mas_hpc.training.losses.kl import kl_estimate


def _kl(difference: float, estimator: str, unbiased: bool = False) -> tuple[float, float]:
    logprob = torch.tensor([difference - 2.0], dtype=torch.float64, requires_grad=True)
    kl = kl_estimate(logprob, torch.tensor([-2.0], dtype=torch.float64), estimator=estimator, unbiased=unbiased)
    kl.sum().backward()
    return kl.item(), logprob.grad.item()


VALUES = [("k1", 1, 1.0), ("k2", 1, 0.5), ("k3", 1, 0.367879), ("k1", -1, -1.0), ("k2", -1, 0.5), ("k3", -1, 0.718282)]
GRADIENTS = [("k1", 1, 1.0), ("k2", 1, 1.0), ("k3", 1, 0.632121), ("k1", -1, 1.0), ("k2", -1, -1.0), ("k3", -1, -1.718282)]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("estimator", "difference", "value"), VALUES)
def test_g15_values(estimator: str, difference: float, value: float, unbiased: bool) -> None:
    assert _kl(difference, estimator, unbiased)[0] == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(("estimator", "difference", "gradient"), GRADIENTS)
def test_g16_gradients(estimator: str, difference: float, gradient: float) -> None:
    assert _kl(difference, estimator)[1] == pytest.approx(gradient, abs=5e-7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("difference", [-3.0, -1.0, 0.0, 2.5])
def test_g16_unbiased_keeps_the_value_and_has_the_gradient_of_k2(estimator: str, difference: float) -> None:
    value, gradient = _kl(difference, estimator, unbiased=True)
    assert value == pytest.approx(_kl(difference, estimator)[0], rel=1e-12)
    assert gradient == pytest.approx(difference)


def test_g16_the_unbiased_estimate_has_the_gradient_of_the_kl_in_expectation() -> None:
    logit = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    logprob = logit.log_softmax(0)
    (exact,) = torch.autograd.grad((logprob.exp() * (logprob - reference)).sum(), logit, retain_graph=True)
    biased = {}
    for estimator, unbiased in (("k3", True), ("k3", False), ("k1", False)):
        kl = kl_estimate(logprob, reference, estimator=estimator, unbiased=unbiased)
        expectation = (logprob.exp().detach() * kl).sum()
        biased[estimator, unbiased] = torch.autograd.grad(expectation, logit, retain_graph=True)[0]
    torch.testing.assert_close(biased["k3", True], exact)
    assert (biased["k3", False] - exact).abs().max() > 0.01
    torch.testing.assert_close(biased["k1", False], torch.zeros_like(exact), atol=1e-15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_g17_extreme_differences_stay_finite(estimator: str, unbiased: bool, dtype: torch.dtype) -> None:
    logprob = torch.tensor([-1e4, 0.0, -1e4, -30.0, 0.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([0.0, -1e4, -1e4, 0.0, -30.0], dtype=dtype)
    kl = kl_estimate(logprob, reference, estimator=estimator, unbiased=unbiased)
    kl.sum().backward()
    assert kl.dtype == dtype and kl.isfinite().all() and logprob.grad.isfinite().all()
    assert estimator == "k1" or (kl >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_random_differences_agree_with_plain_formulas_and_finite_differences(estimator: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logprob, reference = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.expm1(-d) + d}[estimator]
    expected = [plain(p - r) for p, r in zip(logprob.tolist(), reference.tolist(), strict=True)]
    assert kl_estimate(logprob, reference, estimator=estimator).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    logprob.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, estimator=estimator), logprob)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_g5_estimates_add_up_over_micro_batches(estimator: str, unbiased: bool, check_additive) -> None:
    logprob = torch.linspace(-3, -0.1, 9, dtype=torch.float64, requires_grad=True)
    reference = torch.full((9,), -1.3, dtype=torch.float64)

    def share(rows: torch.Tensor) -> torch.Tensor:
        return kl_estimate(logprob[rows], reference[rows], estimator=estimator, unbiased=unbiased).sum() / 9

    check_additive(share, [logprob], torch.arange(9))
