"""Which architectures our attention accepts."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, MistralConfig, PretrainedConfig, Qwen2Config

from mas_hpc.errors import ConfigError
from mas_hpc.models.attention import prepare

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


def test_a_window_as_long_as_the_context_hides_nothing() -> None:
    config = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=64, max_position_embeddings=64)
    assert prepare(AutoModelForCausalLM.from_config(config)).config._attn_implementation == "mas_hpc"
