"""Small random models and a character tokenizer. Initialised wide, so that predictions are not all alike."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from mas_hpc.config import AdapterConfig, RolloutConfig, RunConfig
from mas_hpc.config_methods import SFTConfig
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.rollout.saved_model import save_for_serving
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollout.vllm import VLLMEngine, vllm_engine

from .memory_transport import name_of

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


@pytest.fixture
def scripted(tokenizer) -> Callable[[int], ScriptedEngine]:
    """Make the local engine of a rank: it answers with a letter of its own and the length of the policy's name."""
    return lambda rank: ScriptedEngine(name_of(rank), tokenizer)


def build(kind: str) -> PreTrainedModel:
    """A model of the library in float64, with the library's own attention."""
    torch.manual_seed(0)
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **LLAMA, head_dim=8, tie_word_embeddings=True))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **LLAMA))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, **LLAMA, head_dim=16, sliding_window=None))
        case "smollm3":
            model = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, **LLAMA, no_rope_layer_interval=2))
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


@pytest.fixture(params=["llama", "qwen3", "gpt2", "qwen2", "mistral", "smollm3"])
def library_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def small_model() -> PreTrainedModel:
    """What vLLM can serve on a CPU: float32, heads of 32."""
    torch.manual_seed(0)
    sizes = LLAMA | {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"initializer_range": 0.15}), **sizes)).eval()


def small_bank(model: PreTrainedModel) -> AdapterBank:
    """Adapters of two policies, both of which change the model."""
    bank = AdapterBank.install(
        model, ["solver", "critic"], rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "down_proj"), seed=0
    )
    generator = torch.Generator().manual_seed(1)
    for policy in bank.policies:
        bank.assign(policy, {name: torch.randn(t.shape, generator=generator) / 4 for name, t in bank.tensors(policy).items()})
    return bank


def vllm_config(**adapters: object) -> RunConfig:
    return RunConfig(
        rollout=RolloutConfig(engine="vllm", kv_gib=0.02, max_rows=8), adapters=AdapterConfig(**adapters), method=SFTConfig()
    )  # fmt: skip


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; run: make test-vllm")


@pytest.fixture(scope="session")
def vllm_plain(needs_vllm, tokenizer, tmp_path_factory) -> VLLMEngine:
    """vLLM on `small_model`; tests that load other weights put these back."""
    folder, policies = save_for_serving(small_model(), tokenizer, None, tmp_path_factory.mktemp("plain"))
    return vllm_engine(vllm_config(), folder, tokenizer, policies)


@pytest.fixture(scope="session")
def vllm_adapted(needs_vllm, tokenizer, tmp_path_factory) -> VLLMEngine:
    """vLLM on `small_model` with the adapters of `small_bank`; tests that load other weights put these back."""
    model = small_model()
    folder, policies = save_for_serving(model, tokenizer, small_bank(model), tmp_path_factory.mktemp("adapted"))
    config = vllm_config(policies="per_agent", rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "down_proj"))
    return vllm_engine(config, folder, tokenizer, policies)
