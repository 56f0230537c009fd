"""Small random models and a character tokenizer. Initialised wide, so that predictions are not all alike."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ALPHABET = "0123456789abcdefghijklmnopqrstu"
SIZES = {"vocab_size": 32, "initializer_range": 0.3}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, id 0 is special; '0' is 1, 'a' is 11."""
    vocabulary = {"<eos>": 0} | {character: i for i, character in enumerate(ALPHABET, 1)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<eos>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def build(kind: str) -> PreTrainedModel:
    """A model of the library in float64, with the library's own attention."""
    torch.manual_seed(0)
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **LLAMA, head_dim=8, tie_word_embeddings=True))
        case "gpt2":
            config = GPT2Config(
                **SIZES,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                eos_token_id=None,
                bos_token_id=None,
                pad_token_id=0,
            )
            model = GPT2LMHeadModel(config)
    return model.double().eval()


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def library_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)
