"""Linear layers whose products an AMD processor computes with oneDNN, where torch itself would call MKL.

SmolLM2-135M in fp32 on an AMD EPYC (Zen 4), one thread, 128 to 5,376 rows: x @ W.T and its gradient dy @ W take a ninth
less time; on an Intel Xeon (Sapphire Rapids) a twelfth more. The gradient of the weight gains nowhere, and stays with MKL.
The weight keeps its own layout: nothing is copied, so nothing can be out of date. The op is one that torch.compile uses; it
is not part of torch's public interface.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_WEIGHT = 1 << 16
"""Elements; with smaller weights the call costs more than it saves."""
MIN_ROWS = 128
"""With fewer rows, oneDNN spends on rearranging the weight what it saves on the product."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map [..., in] to [..., out] as torch.nn.functional.linear does, in value and in gradients; weight [out, in]."""
    if not _suited(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


def _suited(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and _is_amd()
    )


@cache
def _is_amd() -> bool:
    return "AMD" in str(torch.cpu.get_capabilities().get("cpu_name", ""))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight needs no input in the backward pass: keeping it would double what a layer keeps.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


def use_linear(model: nn.Module) -> None:
    """Turn every plain nn.Linear of the model into a Linear, in place: parameters, hooks and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
