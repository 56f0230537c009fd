"""Bytes of one tile at the height of a step, by what they are, and of the host behind it."""

from __future__ import annotations

from dataclasses import dataclass

from mas_hpc.config import RunConfig
from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.config_methods import OnlineConfig, PPOConfig
from mas_hpc.scaling.compute import Trained
from mas_hpc.scaling.shape import DTYPE_BYTES, ModelShape

STATES = {"adamw": 2.0, "adafactor": 0.02}
"""Numbers that an optimizer keeps a weight."""
SAVED_OF_WIDTH, SAVED_OF_FFN = 14, 4
"""Numbers a token that a layer keeps for its backward pass, in widths (norms, residuals, queries, keys, values, output) and in
widths of its feed-forward part (gate, up, the activation of gate, and the product)."""
HEAD_CHUNK = 1024
"""Predictors whose logits exist at once, in float32 and with their gradient."""
RESERVED = 0.05
"""Part of a tile that the runtime and fragmentation take: published runs end at 95% (60.75 of 64 GiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Ranks that a copy of each is split over.

    Example: Shards(weights=1, gradients=1, optimizer=48)  # zero1 on 48 ranks
    """

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one rank, in bytes.

    Example: Memory(weights=4e9, gradients=4e9, optimizer=8e9, activations=3e9, gathered=1e9, kv=4e9, host=0.0)
    """

    weights: float
    """References and critics too."""
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    """Whole layers, or what the engine serves where that is a copy, beside what is kept."""
    kv: float
    host: float
    """In the host's memory: what is offloaded."""

    @property
    def tile(self) -> float:
        """On the tile."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.kv

    def fits(self, tile_bytes: float, host_bytes: float) -> bool:
        """Whether a tile and a rank's part of its host hold it."""
        return self.tile <= (1 - RESERVED) * tile_bytes and self.host <= host_bytes


def shards_of(settings: DistributedConfig, ranks: int) -> Shards:
    """How a strategy splits weights, gradients and optimizer states."""
    split = {"ddp": (0, 0, 0), "fsdp2": (1, 1, 1), "zero1": (0, 0, 1), "zero2": (0, 1, 1), "zero3": (1, 1, 1)}
    data = data_ranks(settings, ranks)
    size = min(settings.shard_size or data, data)
    weights, gradients, optimizer = (size if is_split else 1 for is_split in split[settings.strategy])
    return Shards(weights=weights, gradients=gradients, optimizer=optimizer)


def data_ranks(settings: DistributedConfig, ranks: int) -> int:
    """Groups of ranks that train each layer together: each group gets other samples."""
    return max(1, ranks // settings.tensor_parallel)


def memory_of(config: RunConfig, shape: ModelShape, trained: Trained, ranks: int, tokens: float) -> Memory:
    """Of a rank among so many, whose largest pass has so many tokens of a tree."""
    shards, size = shards_of(config.distributed, ranks), DTYPE_BYTES[config.model.dtype]
    method, whole_model = config.method, trained.head > 0
    models = 1 + (isinstance(method, PPOConfig) and method.critic == "separate")
    online = isinstance(method, OnlineConfig)
    references = int(whole_model and isinstance(method, OnlineConfig) and method.kl.coefficient > 0)
    split = shards if whole_model else Shards(weights=1, gradients=1, optimizer=1)  # adapters are whole on every rank
    base = 0 if whole_model else shape.parameters
    own = models * trained.parameters / config.distributed.tensor_parallel
    others = (base + references * shape.parameters) / config.distributed.tensor_parallel
    weights = size * (own / split.weights + others / shards.weights)
    gradients = size * own / split.gradients
    optimizer = STATES[method.optimizer] * size * own / split.optimizer
    is_split = shards.weights > 1
    is_copied = is_split or config.rollout.engine == "vllm"
    moved = config.distributed.offload
    host = (optimizer + (weights if is_split else 0.0)) if moved else 0.0
    return Memory(
        weights=0.0 if moved and is_split else weights, gradients=gradients, optimizer=0.0 if moved else optimizer, host=host,
        activations=activation_bytes(shape, tokens, compute_bytes(config), trained.checkpointing),
        gathered=_gathered(config, shape, is_split=is_split, serves_copy=online and is_copied),
        kv=config.rollout.kv_gib * 2**30 if online else 0.0,
    )  # fmt: skip


def compute_bytes(config: RunConfig) -> int:
    """Of a number in a pass."""
    return 2 if config.distributed.compute_dtype == "bfloat16" else DTYPE_BYTES[config.model.dtype]


def activation_bytes(shape: ModelShape, tokens: float, size: int, checkpointing: bool) -> float:
    """What is kept from the forward for the backward pass; with checkpointing an input a layer, and one layer in full."""
    layer = (SAVED_OF_WIDTH * shape.width + SAVED_OF_FFN * shape.ffn) * size
    kept = shape.layers * shape.width * size + layer if checkpointing else shape.layers * layer
    logits = 2 * 4 * shape.vocabulary * min(HEAD_CHUNK, tokens)
    return kept * tokens + logits


def _gathered(config: RunConfig, shape: ModelShape, *, is_split: bool, serves_copy: bool) -> float:
    """What the engine serves, or while training two layers (one computes, the next arrives) and the head.

    The native engine's copy is whole, or of ranks that share layers this one's part of each; vLLM's is whole.
    """
    parts = config.distributed.tensor_parallel
    copy = shape.parameters * DTYPE_BYTES[config.model.dtype] / (parts if config.rollout.engine == "native" else 1)
    layers = compute_bytes(config) * (2 * shape.layer_parameters + shape.head) / parts if is_split else 0
    return max(copy if serves_copy else 0, layers)
