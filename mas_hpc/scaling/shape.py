"""How large a model is, read from its configuration alone: nothing is built, no weights are read, torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mas_hpc.config import ModelConfig
from mas_hpc.errors import ConfigError

SHAPES_FILE = Path(__file__).parent / "shapes.json"
"""Published models by name, as their config.json has them."""
TINY_VOCABULARY = 30
"""Characters of the tiny model, with <pad> and <eos>."""
DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder with gated feed-forward layers and no biases: Llama, Qwen, Mistral, SmolLM.

    Example: ModelShape(width=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152, tied=True)
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of a feed-forward layer."""
    vocabulary: int
    tied: bool
    """Whether the LM head is the embedding."""

    @property
    def layer_parameters(self) -> int:
        """Of one layer: queries and output, keys and values, three feed-forward matrices, two norms."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.width * self.ffn + 2 * self.width

    @property
    def body(self) -> int:
        """Weights that every token meets: all but embedding and head."""
        return self.layers * self.layer_parameters + self.width

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.body + (1 if self.tied else 2) * self.head

    @property
    def attention(self) -> int:
        """Layers x heads x width of a head: FLOPs of attention are 4 times that, a pair of tokens."""
        return self.layers * self.heads * self.head_dim

    @property
    def kv_values(self) -> int:
        """Numbers that a token's keys and values are."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapter_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Of one LoRA adapter on these linear layers."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = {
            "q_proj": self.width + query, "k_proj": self.width + key, "v_proj": self.width + key, "o_proj": query + self.width,
            "gate_proj": self.width + self.ffn, "up_proj": self.width + self.ffn, "down_proj": self.ffn + self.width,
        }  # fmt: skip
        return self.layers * rank * sum(side for name, side in sides.items() if name in targets)


def shape_of(model: ModelConfig) -> ModelShape:
    """The shape of `model.path`. Raises ConfigError where that is neither built in nor found on this machine."""
    if model.path == "tiny":
        return ModelShape(
            width=model.hidden_size, layers=model.num_layers, heads=model.num_heads, kv_heads=model.num_heads,
            head_dim=model.hidden_size // model.num_heads, ffn=2 * model.hidden_size, vocabulary=TINY_VOCABULARY, tied=True,
        )  # fmt: skip
    if model.path == "smollm2":
        return named_shape("smollm2-135m")
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return read_shape(folder / "config.json")
    return read_shape(_from_hub(model.path))


def named_shape(name: str) -> ModelShape:
    """A published model, or the shape in the config.json at a path. Raises ConfigError naming those that there are."""
    known = json.loads(SHAPES_FILE.read_text(encoding="utf-8"))
    if name in known:
        return parse_shape(known[name], name)
    file = Path(name).expanduser()
    if file.is_dir():
        file /= "config.json"
    if not file.is_file():
        raise ConfigError(f"shape {name!r}: expected one of {sorted(known)}, or the path of a config.json")
    return read_shape(file)


def read_shape(file: Path) -> ModelShape:
    """From a model's config.json. Raises ConfigError for a file or an architecture that cannot be counted."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected the config.json of a causal language model ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a JSON object, the config.json of a causal language model")
    return parse_shape(raw, str(file))


def parse_shape(raw: Mapping[str, Any], where: str) -> ModelShape:
    """From what a config.json holds. Raises ConfigError starting with `where`."""
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)]
    if experts:
        raise ConfigError(f"{where}: {experts[0]}={raw[experts[0]]}: only dense models are counted; name a dense one")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    wrong = [name for name in names if not isinstance(raw.get(name), int) or raw[name] < 1]
    if wrong:
        raise ConfigError(f"{where}: {', '.join(wrong)}: expected positive integers, as Llama and Qwen have them")
    heads = raw["num_attention_heads"]
    return ModelShape(
        width=raw["hidden_size"], layers=raw["num_hidden_layers"], heads=heads, ffn=raw["intermediate_size"],
        kv_heads=raw.get("num_key_value_heads") or heads, head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocabulary=raw["vocab_size"], tied=bool(raw.get("tie_word_embeddings", False)),
    )  # fmt: skip


def _from_hub(name: str) -> Path:
    """Its config.json alone, from the hub's cache or from the hub."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.path={name!r}: not tiny or smollm2, no such folder, and no config.json to be had from the hub ({reason}); "
            "name a folder with its config.json, or give --shape with a published model or the path of a config.json"
        ) from None
