"""Norms and rotary embeddings against the library's, and that the library's own are back afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaConfig, GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mas_hpc.rollout.native.lean_calls import LeanCalls, Rotary

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config])
def test_a_model_gives_what_it_gives_by_itself(config: type[PreTrainedConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "no_rope_layers": [1, 0]} if config is SmolLM3Config else SIZES
    model = AutoModelForCausalLM.from_config(config(**sizes)).eval()
    calls: list[str] = []
    monkeypatch.setattr(F, "rms_norm", lambda *a, f=F.rms_norm, **k: calls.append("norm") or f(*a, **k))
    monkeypatch.setattr(Rotary, "__call__", lambda *a, f=Rotary.__call__, **k: calls.append("rotary") or f(*a, **k))
    lean = LeanCalls(model)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    for positions in (torch.arange(9), torch.arange(9).flip(0)):
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.weight = nn.Parameter(torch.empty_like(module.weight).uniform_(-1, 1))  # not those of before
        tokens = torch.randint(64, (1, 9))
        with torch.inference_mode():
            expected = model(tokens, position_ids=positions[None]).logits
            with lean.used():
                found = model(tokens, position_ids=positions[None]).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert calls.count("norm") == 2 * norms and calls.count("rotary") == 2 * (1 if config is SmolLM3Config else 2)
    assert not any("forward" in vars(module) for module in model.modules())
    (library,) = {type(layer.self_attn).forward.__globals__["apply_rotary_pos_emb"] for layer in model.model.layers}
    assert library.__module__.startswith("transformers")


def test_a_quarter_turn_and_none() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    cos, sin = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])
    query, key = Rotary()(x, 2 * x, cos, sin)
    assert query.flatten().tolist() == [-3, 2, 1, 4] and key.flatten().tolist() == [-6, 4, 2, 8]


def test_modules_that_compute_something_else_stay_as_they_are() -> None:
    attention = GemmaAttention(GemmaConfig(**SIZES), 0)
    others = nn.ModuleList(
        [GemmaRMSNorm(8), Qwen3RMSNorm(8).bfloat16(), Qwen3RMSNorm(8).double(), nn.LayerNorm(8), attention]
    )  # fmt: skip
    with torch.inference_mode(), LeanCalls(others).used():
        assert not any("forward" in vars(module) for module in others)
