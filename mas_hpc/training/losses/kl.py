"""Estimates of KL(policy || reference) from sampled tokens. Legend: N trained tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

K3_LIMIT = 10.0  # before exp: inf * 0 would put NaN into the gradient


def kl_estimate(logprob_N: Tensor, reference_logprob_N: Tensor, *, estimator: Estimator, unbiased: bool = False) -> Tensor:
    """Estimate for each token [N] in nats, with d = logprob - reference (Schulman 2020, joschu.net/blog/kl-approx.html).

    Value and gradient with respect to logprob, for tokens that were sampled from the policy:
    - k1: d, gradient 1. It ignores the reference: for rewards; in a loss it does nothing but add noise.
    - k2: d^2 / 2, gradient d, whose expectation is the gradient of the KL (arXiv 2506.09477).
    - k3: exp(-d) - 1 + d >= 0, gradient 1 - exp(-d): biased. Where d < -10 it is constant (exp(10) - 11) and its gradient 0.
    `unbiased`: the value of the estimator with the gradient of k2 (verl's "k1+" and "k3+").
    """
    difference_N = logprob_N - reference_logprob_N
    half_square_N = difference_N.square() / 2
    if estimator == "k1":
        value_N = difference_N
    elif estimator == "k2":
        value_N = half_square_N
    else:
        bounded_N = difference_N.clamp(min=-K3_LIMIT)
        value_N = (-bounded_N).exp() - 1 + bounded_N
    return value_N.detach() + (half_square_N - half_square_N.detach()) if unbiased else value_N
