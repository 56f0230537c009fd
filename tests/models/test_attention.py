"""Which architectures our attention accepts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import rms_norm
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from mas_hpc.errors import ConfigError
from mas_hpc.models.attention import hidden_states, prepare
from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.prefix_tree import merge

SHAPE = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4),  # names no layer types
        Qwen2Config(**SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    ids=["one window", "by layer"],
)
def test_sliding_windows_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ConfigError, match="sliding"):
        prepare(AutoModelForCausalLM.from_config(config))


def test_soft_capped_attention_is_refused_by_its_cap() -> None:
    config = Gemma2Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * 2, final_logit_softcapping=None
    )
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping=50\.0"):
        prepare(AutoModelForCausalLM.from_config(config))


def test_attention_sinks_are_refused_where_the_library_hands_them_over() -> None:
    full = {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}
    model = prepare(AutoModelForCausalLM.from_config(GptOssConfig(**SHAPE, num_key_value_heads=2, head_dim=8, **full)))
    tree = merge([[1, 2, 3], [1, 4]])
    with pytest.raises(ConfigError, match="gpt_oss has attention sinks"):
        hidden_states(model, *map(torch.from_numpy, (tree.token_T, tree.position_T)), TreeAttention(tree.leave_T))


def test_logits_that_are_more_than_the_head_are_refused() -> None:
    """The rollout engine would sample from another distribution than the model's, and say nothing."""
    with pytest.raises(ConfigError, match=r"granite.*logits_scaling=8.0"):
        prepare(AutoModelForCausalLM.from_config(GraniteConfig(**SHAPE, logits_scaling=8.0)))


def test_a_window_as_long_as_the_context_hides_nothing() -> None:
    config = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=64, max_position_embeddings=64)
    assert prepare(AutoModelForCausalLM.from_config(config)).config._attn_implementation == "mas_hpc"


def in_double_precision(config: PretrainedConfig) -> PreTrainedModel:
    """The library's RMSNorm computes in float32 whatever the model's dtype, which would hide errors above 1e-8."""
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=1e-6)
    return model


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, num_key_value_heads=2),
        Qwen2Config(**SHAPE, num_key_value_heads=2),
        Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8),
        MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=None),
        SmolLM3Config(**SHAPE, num_key_value_heads=2, no_rope_layer_interval=2, pad_token_id=0),
        GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    ],
    ids=lambda config: config.model_type,
)
def test_a_forest_gives_each_path_the_hidden_states_and_gradients_of_the_library(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    library = in_double_precision(config)
    paths = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7, 8], [9]]
    separate = torch.cat([library.base_model(torch.tensor([path])).last_hidden_state[0] for path in paths])
    weight = torch.randn(separate.shape, dtype=torch.float64)
    (separate * weight).sum().backward()
    expected = {name: weight.grad for name, weight in library.named_parameters()}
    ours = prepare(in_double_precision(config))
    ours.load_state_dict(library.state_dict())
    tree = merge(paths)
    token_T, position_T = torch.from_numpy(tree.token_T), torch.from_numpy(tree.position_T)
    hidden_TD = hidden_states(ours, token_T, position_T, TreeAttention(tree.leave_T, limit=2, shared=2))
    together = torch.cat([hidden_TD[torch.from_numpy(index)] for index in tree.path_index])
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-10)
    (together * weight).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)
