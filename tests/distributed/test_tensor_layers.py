"""Which models and ranks can share layers, and what is said of the others."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.strategies import build_strategy
from mas_hpc.distributed.tensor_layers import TensorGroup, check_cut
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError

SIZE = {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TWO = DistributedConfig(tensor_parallel=2)


def llama(**changes: int) -> LlamaForCausalLM:
    shape = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    return LlamaForCausalLM(LlamaConfig(**SIZE, **shape))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads=3, which 2 ranks cannot share"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1, which 2 ranks cannot share"),
        ({"intermediate_size": 33}, r"layers\.0\.mlp\.gate_proj\.weight of llama has a side of 33"),
    ],
)
def test_layers_that_do_not_divide_are_named(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"distributed\.tensor_parallel=2: .*{said}"):
        check_cut(llama(**changes), 2)


def test_other_architectures_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="transformers has no plan by which gpt2 is cut"):
        check_cut(gpt2, 2)
    phi3 = Phi3ForCausalLM(Phi3Config(**SIZE, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(ConfigError, match=r"phi3 cuts layers\.0\.self_attn\.o_proj 'rowwise_split_input'"):
        check_cut(phi3, 2)
    check_cut(llama(), 2)


def test_ranks_that_do_not_divide_or_span_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide into groups of 2; start a multiple of 2 ranks"):
        build_strategy(World(size=3, hosts=("a",) * 3), TWO)
    with pytest.raises(ConfigError, match="ranks 2 to 3 would share each layer over the network, as they are on a and b"):
        build_strategy(World(size=4, hosts=("a", "a", "a", "b")), TWO)
    assert build_strategy(World(), TWO).tensor is None  # one rank trains alone, whatever is named


def test_deepspeed_does_not_share_layers() -> None:
    with pytest.raises(ValidationError, match=r"distributed\.tensor_parallel=2: distributed\.strategy=zero3 does not read it"):
        DistributedConfig(tensor_parallel=2, strategy="zero3")


def test_every_row_has_one_owner_also_where_they_do_not_divide() -> None:
    for length, size in ((30, 2), (31, 2), (5, 4), (3, 4)):
        parts = [TensorGroup(rank=rank, size=size, group=None).part(length) for rank in range(size)]  # type: ignore[arg-type]
        assert [row for part in parts for row in range(length)[part]] == list(range(length))
