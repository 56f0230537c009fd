import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mas_hpc.rollout.native import fused_norms
from mas_hpc.rollout.native.fused_norms import FusedNorms


def test_norms_give_what_the_library_gives_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(48, eps=1e-2)
    fused = FusedNorms(torch.nn.Sequential(norm))
    x = torch.randn(2, 5, 48)
    calls = []
    monkeypatch.setattr(fused_norms.F, "rms_norm", lambda *a, rms_norm=F.rms_norm, **k: calls.append(1) or rms_norm(*a, **k))
    for _ in range(2):
        with torch.no_grad():
            norm.weight.uniform_(-1, 1)  # weights are read as they are
        expected = norm(x)
        with fused.used():
            torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-6)
    assert len(calls) == 2 and "forward" not in vars(norm)


def test_norms_that_compute_something_else_stay_as_they_are() -> None:
    others = torch.nn.Sequential(GemmaRMSNorm(8), Qwen3RMSNorm(8).bfloat16(), Qwen3RMSNorm(8).double(), torch.nn.LayerNorm(8))
    with FusedNorms(others).used():
        assert not any("forward" in vars(module) for module in others)
