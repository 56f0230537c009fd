"""A second oracle: Liger's chunked log-probabilities, which its losses are made of (extra: bench)."""

import pytest
import torch
from mas_hpc_kernels import LogitRule, linear_logprob

REASON = "liger-kernel is in the extra bench"
peer = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo", reason=REASON)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_values_and_gradients_are_ligers(vocabulary, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(9, 16, generator=generator, requires_grad=True)
    weight_VD = torch.randn(vocabulary, 16, generator=generator).div_(4).requires_grad_()
    bias_V = torch.randn(vocabulary, generator=generator, requires_grad=True)
    target_N = torch.randint(vocabulary, (9,), generator=generator)
    ours_N, _ = linear_logprob(hidden_ND, weight_VD, target_N, temperature=temperature, rule=LogitRule(bias_V=bias_V))
    theirs_N = peer._ChunkedSelectiveLogProbFunction.apply(hidden_ND, weight_VD, target_N, bias_V, temperature, 4096)
    torch.testing.assert_close(ours_N, theirs_N, rtol=0, atol=1e-5)
    upstream_N, leaves = torch.linspace(-1, 1, 9), (hidden_ND, weight_VD, bias_V)
    gradients = [torch.autograd.grad(values_N, leaves, upstream_N) for values_N in (ours_N, theirs_N)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
