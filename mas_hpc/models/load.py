"""From `model.path` to a causal language model with its tokenizer: tiny, smollm2, a local folder or a hub name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    logging,
)

from mas_hpc.config import ModelConfig
from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.hub import folder_of
from mas_hpc.models import smollm2
from mas_hpc.models.attention import prepare

ALPHABET = "0123456789+-*/=()!?$. \nQSCRV"
"""Characters of the tiny model; each is one token. <pad> and <eos> follow."""
CPU = torch.device("cpu")
MAX_POSITIONS = 512
"""Context of the tiny model in tokens."""


def load_model(
    config: ModelConfig, *, seed: int, device: torch.device = CPU
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    """Return the model on `device` (our attention, evaluation mode, no dropout, `config.dtype`) and its tokenizer.

    `seed` initialises the tiny model and leaves torch's own generator alone; trained models do not depend on it.
    Raises ConfigError for a path or size that cannot be used, CheckpointError for damaged or incomplete weights.
    """
    logging.disable_progress_bar()
    folder = model_folder(config)
    model, tokenizer = _tiny_model(config, seed) if folder is None else _pretrained(config, folder)
    return finished(model).to(device), tokenizer  # type: ignore[arg-type]


def finished(model: PreTrainedModel) -> PreTrainedModel:
    """The model with our attention, in evaluation mode, without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # also in train(): the trained log-probs must be those of the policy that was sampled
    return prepare(model.eval())


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, where the model is on other ranks. Raises ConfigError as load_model does."""
    folder = model_folder(config)
    if folder is None:
        return _tiny_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loadable(config.path, folder, error)) from None


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, without reading its weights. Raises ConfigError as load_model does."""
    folder = model_folder(config)
    if folder is None:
        return _tiny_model(config, 0)[0].num_parameters()
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code).num_parameters()
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loadable(config.path, folder, error)) from None


def model_folder(config: ModelConfig, *, refresh: bool = False) -> Path | None:
    """Where the model lies on this machine: in the folder named, or in the cache of smollm2 or of the hub; None for tiny.

    What is not in the cache is brought there, and with `refresh` what has changed. Raises ConfigError for a name that leads
    nowhere, CheckpointError for a smollm2 that cannot be converted.
    """
    if config.path == "tiny":
        return None
    if config.path == "smollm2":
        return smollm2.converted_folder()
    local = Path(config.path).expanduser()
    if local.is_dir():
        return local
    try:
        return folder_of(config.path, "model", refresh=refresh)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loadable(config.path, local, error)) from None


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model compute activations again in the backward pass (arXiv 1604.06174) whenever it is in training mode.

    Raises ConfigError for an architecture that would drop activations in that mode.
    """
    rates = {name: getattr(model.config, name, 0.0) for name in ("dropout", "activation_dropout", "resid_pdrop", "embd_pdrop")}
    functional = {name: rate for name, rate in rates.items() if rate}
    if functional and not any(isinstance(module, torch.nn.Dropout) for module in model.modules()):
        raise ConfigError(
            f"model.activation_checkpointing=true: {model.config.model_type} has dropout {functional}, and trained log-probs "
            "would not be those that were sampled; set it to false, or these to 0 in the model's config.json"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*ALPHABET, "<pad>", "<eos>"))}
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<none>"))  # absent, so it raises
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _tiny_model(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.hidden_size % (2 * config.num_heads):
        raise ConfigError(
            f"model.hidden_size={config.hidden_size}, model.num_heads={config.num_heads}: heads need an equal and even "
            f"width; expected model.hidden_size to be a multiple of {2 * config.num_heads}"
        )
    tokenizer = _tiny_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(shape)
    return model.to(getattr(torch, config.dtype)), tokenizer


def _pretrained(config: ModelConfig, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights from safetensors only."""
    path = config.path
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, config.dtype), use_safetensors=True, output_loading_info=True, **source
        )
    except SafetensorError as error:
        raise CheckpointError(f"model.path={path!r}: damaged weights ({error}); copy the model again") from None
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loadable(path, folder, error)) from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"model.path={path!r}: {len(missing)} weights are missing, such as {missing[:3]}, and would be "
            "random; copy the model again, or choose one that was saved as a causal language model"
        )
    return model, tokenizer


def _not_loadable(path: str, local: Path, error: Exception) -> str:
    """What was tried, and what the library said."""
    reason = " ".join(str(error).split())[:400]
    if local.is_dir():
        where = "" if local == Path(path).expanduser() else f" {local}"
        return (
            f"model.path={path!r}: the folder{where} holds no model that can be loaded; expected config.json, *.safetensors "
            f"and tokenizer files of a causal language model ({reason})"
        )
    names = ["tiny", "smollm2"] + ([entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else [])
    near = difflib.get_close_matches(local.name, names, n=3)
    hint = f"; perhaps {near}" if near else ""
    return f"model.path={path!r}: not tiny or smollm2, no such folder, and not loadable as a hub name{hint} ({reason})"
