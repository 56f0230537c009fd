"""The one loss operation: log-probabilities of chosen tokens under a linear head, whose logits never exist as a whole.

Legend: N targets, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mas_hpc_kernels.backends import ONCE, BackendName, choose, load
from mas_hpc_kernels.operation import (
    PLAIN,
    FrozenBackend,
    LogitRule,
    Problem,
    Statistics,
    Upstream,
    VocabularyShard,
    merge,
)


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    need_entropy: bool = True,
    entropy_gradient: bool = False,
    rule: LogitRule = PLAIN,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return each target's log-probability and each row's entropy under softmax(logits / temperature).

    Natural logarithms, [N], in float32 or, for float64 inputs, float64. The log-probability is differentiable in hidden
    and, where they need it, weight and bias; the entropy (None unless needed) only with `entropy_gradient`, for an entropy
    bonus. Raises KernelError for a named backend that cannot run on the device of `hidden_ND`, ValueError for targets that
    the head has no row for, and for a mask that a soft cap would lift.
    """
    assert temperature > 0, "greedy decoding is scored at temperature 1"
    assert need_entropy or not entropy_gradient, "the gradient of an entropy that is not needed"
    _check(hidden_ND, weight_VD, target_N, rule)
    name = choose(backend, hidden_ND.device.type).name
    first = rule.shard.start if rule.shard else 0
    problem = Problem(
        hidden_ND=hidden_ND, weight_VD=weight_VD, target_N=target_N - first, bias_V=rule.bias_V, softcap=rule.softcap,
        inverse_temperature=1.0 / temperature,
    )  # fmt: skip
    need_head = weight_VD.requires_grad or (rule.bias_V is not None and rule.bias_V.requires_grad)
    if not torch.is_grad_enabled() or not (hidden_ND.requires_grad or need_head):
        whole = merge(load(name).statistics(problem, need_entropy=need_entropy), rule.shard)
        return whole.logprob_N, whole.entropy_N if need_entropy else None
    # What autograd is to see has to be an argument of its own.
    inputs = (hidden_ND, weight_VD, rule.bias_V, problem, rule.shard)
    options = _Options(need_entropy, entropy_gradient, name)
    if name in ONCE and not need_head and not entropy_gradient:
        return _FrozenHead.apply(*inputs, options)
    return _AnyHead.apply(*inputs, options)


def _check(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, rule: LogitRule) -> None:
    """What backends would answer with numbers that look right, or with a read beyond the end."""
    assert hidden_ND.dtype == weight_VD.dtype, "a head in another type than the hidden states"
    assert hidden_ND.ndim == weight_VD.ndim == 2 and hidden_ND.shape[1] == weight_VD.shape[1], "not [N, D] and [V, D]"
    assert target_N.shape == hidden_ND.shape[:1] and target_N.dtype == torch.int64, "not one int64 target for each row"
    assert rule.softcap >= 0, "a soft cap is positive, or 0 for none"
    assert rule.bias_V is None or rule.bias_V.shape == weight_VD.shape[:1], "not one bias for each row of the head"
    if rule.bias_V is not None and rule.softcap and bool(rule.bias_V.isneginf().any()):
        raise ValueError(
            f"bias_V has -inf and softcap={rule.softcap}: the cap comes after the bias and would make a logit of "
            f"{-rule.softcap} of it; leave those rows out of the head"
        )
    # Which ids the other ranks have is not known here.
    is_wrong_N = target_N < 0 if rule.shard else (target_N < 0) | (target_N >= len(weight_VD))
    if bool(is_wrong_N.any()):
        raise ValueError(
            f"target {target_N[is_wrong_N][0].item()} is no row of the head, which has {len(weight_VD)}"
            f"{' here' if rule.shard else ''}: leave targets out that are not to be scored, and score others with a head of "
            "their vocabulary"
        )


class _Options(NamedTuple):
    need_entropy: bool
    entropy_gradient: bool
    backend: str


class _FrozenHead(torch.autograd.Function):
    """The forward keeps d logprob / d hidden, [N, D], so that the backward is one product per row."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
        problem: Problem, shard: VocabularyShard | None, options: _Options,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        backend = cast(FrozenBackend, load(options.backend))
        whole, slope_ND = backend.statistics_and_slope(problem, shard, need_entropy=options.need_entropy)
        ctx.save_for_backward(slope_ND)
        ctx.dtype = hidden_ND.dtype
        return _results(ctx, whole, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND * grad_N[:, None]).to(ctx.dtype), None, None, None, None, None


class _AnyHead(torch.autograd.Function):
    """The backward computes the logits again, unless the backend has kept them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
        problem: Problem, shard: VocabularyShard | None, options: _Options,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        kept: list[Tensor] = []
        statistics = load(options.backend).statistics
        whole = merge(statistics(replace(problem, kept=kept), need_entropy=options.need_entropy), shard)
        ctx.save_for_backward(hidden_ND, weight_VD, problem.target_N, bias_V, *whole)
        ctx.rest = kept, problem.softcap, problem.inverse_temperature, shard, options
        return _results(ctx, whole, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_N, bias_V, *statistics = ctx.saved_tensors
        kept, softcap, inverse_temperature, shard, options = ctx.rest
        problem = Problem(
            hidden_ND=hidden_ND, weight_VD=weight_VD, target_N=target_N, bias_V=bias_V, softcap=softcap,
            inverse_temperature=inverse_temperature, kept=kept,
        )  # fmt: skip
        upstream = Upstream(grad_N, entropy_grad_N if options.entropy_gradient else None)
        need_head = any(ctx.needs_input_grad[1:3])
        gradients = load(options.backend).gradients(problem, Statistics(*statistics), upstream, need_head=need_head)
        grad_ND = shard.reduce(gradients.hidden_ND, "sum") if shard else gradients.hidden_ND
        grad_VD, grad_V = gradients.weight_VD, gradients.bias_V
        return (
            grad_ND.to(hidden_ND.dtype),
            None if grad_VD is None else grad_VD.to(weight_VD.dtype),
            None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
            None, None, None,
        )  # fmt: skip


def _results(ctx: Any, whole: Statistics, options: _Options) -> tuple[Tensor, Tensor | None]:
    entropy_N = whole.entropy_N if options.need_entropy else None
    if entropy_N is not None and not options.entropy_gradient:
        ctx.mark_non_differentiable(entropy_N)
    return whole.logprob_N, entropy_N
