"""Checks of the Triton kernels in the interpreter, which test_triton.py runs in a process of its own."""

from dataclasses import replace

import pytest
import torch
from mas_hpc_kernels import LogitRule, linear_logprob, reference
from mas_hpc_kernels.triton import launch

NUM_TARGETS, VOCABULARY, HIDDEN = 35, 53, 21


@pytest.mark.parametrize("num_programs", [1, 9, 512])
@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 64, 32), (64, 16, 16)], ids=str)
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "capped"])
def test_every_tile_and_number_of_parts_gives_the_oracle(monkeypatch, is_plain, tile, num_programs):
    """Parts of one and of several blocks, the last of them with nothing in it; chunks of 20 rows in the backward."""
    rows, vocabulary, hidden = tile
    chosen = replace(launch.TILES["cpu", 4], rows=rows, vocabulary=vocabulary, hidden=hidden)
    monkeypatch.setitem(launch.TILES, ("cpu", 4), chosen)
    monkeypatch.setattr(launch, "NUM_PROGRAMS", num_programs)
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 20 * VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(NUM_TARGETS, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    bias_V = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64, requires_grad=True)
    target_N = torch.randint(VOCABULARY, (NUM_TARGETS,), generator=generator)
    rule = LogitRule() if is_plain else LogitRule(bias_V=bias_V, softcap=3.0)
    inputs = (hidden_ND, weight_VD) if is_plain else (hidden_ND, weight_VD, bias_V)
    found = []
    for call, named in ((linear_logprob, {"backend": "triton"}), (reference.linear_logprob, {})):
        logprob_N, entropy_N = call(
            hidden_ND, weight_VD, target_N, temperature=0.7, entropy_gradient=not is_plain, rule=rule, **named
        )
        loss = (0.1 * logprob_N).exp().sum() + (0 if is_plain else entropy_N.square().sum())
        found.append((logprob_N, entropy_N, *torch.autograd.grad(loss, inputs)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_mean_and_gradients_are_those_of_ligers_triton_kernel():
    """A second oracle (extra: bench): its fused linear cross-entropy."""
    peer = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy", reason="liger-kernel is in the extra bench")
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(NUM_TARGETS, HIDDEN, generator=generator, requires_grad=True)
    weight_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
    target_N = torch.randint(VOCABULARY, (NUM_TARGETS,), generator=generator)
    ours = -linear_logprob(hidden_ND, weight_VD, target_N, backend="triton")[0].mean()
    theirs = peer.LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, target_N)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(loss, (hidden_ND, weight_VD)) for loss in (ours, theirs)]
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
