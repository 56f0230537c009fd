"""One attention function for every transformers architecture: it hands query, key and value to the pass's own `attend`.

A pass is one flat row of tokens. Training attends along a tree (tree_attention), decoding along cached paths (rollout.native).
Legend: H query heads, K key/value heads, T tokens, N queries, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from mas_hpc.errors import ConfigError
from mas_hpc.models.linear import use_linear

NAME = "mas_hpc"


class Attend(Protocol):
    """What a pass does for attention in one layer."""

    def __call__(self, layer: int, query_HND: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float, /) -> Tensor:
        """Return the attended values, [N, H, D]. In a pass over new tokens below cached ones N is less than T."""
        ...


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float | None = None, s_aux: Tensor | None = None, attend: Attend, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if s_aux is not None:
        raise ConfigError(
            f"model.path: {module.config.model_type} has attention sinks, which tree attention does not compute; "
            "choose a model with plain causal attention"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module.layer_idx, query[0], key[0], value[0], scaling).unsqueeze(0), None


AttentionInterface.register(NAME, _dispatch)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switch the model to our attention, and its linear layers to our product, in place.

    Raises ConfigError for architectures whose attention is not plain causal, or whose logits are not just the LM head's;
    attention sinks show, and are refused, in the first pass.
    """
    config = model.config
    if scaled := scaled_logits(config):
        raise ConfigError(
            f"model.path: the logits of {config.model_type} are scaled or capped ({', '.join(scaled)}), which neither our "
            "rollout nor our training computes; choose a model with a plain linear head"
        )
    kinds = getattr(config, "layer_types", None)
    windowed = [kind for kind in kinds or () if kind != "full_attention"]
    # Mistral, Phi-3 and others name no kinds: all their layers have the one window, if it is shorter than the context.
    if kinds is None and (getattr(config, "sliding_window", None) or math.inf) < config.max_position_embeddings:
        windowed = [f"sliding_window={config.sliding_window}"]
    capped = [f"attn_logit_softcapping={cap}"] if (cap := getattr(config, "attn_logit_softcapping", None)) else []
    if windowed or capped:
        raise ConfigError(
            f"model.path: {config.model_type} has sliding-window or soft-capped attention {sorted({*windowed, *capped})}, "
            "which tree attention does not compute; choose a model with full causal attention"
        )
    model.set_attn_implementation(NAME)
    use_linear(model)
    return model


def scaled_logits(config: PreTrainedConfig) -> list[str]:
    """Settings by which an architecture's logits are more than its LM head applied to the last hidden state."""
    scales = {name: getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")}
    return [f"{name}={value}" for name, value in scales.items() if value not in (None, 1.0)]


def hidden_states(
    model: PreTrainedModel, token_T: Tensor, position_T: Tensor, attend: Attend, *, noise_TD: Tensor | None = None
) -> Tensor:
    """Run the backbone once over a flat row of tokens; return the last hidden states, [T, hidden].

    `noise_TD` is added to the input embeddings: NEFTune (arXiv 2310.05914), whose scale is the caller's.
    """
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if noise_TD is None:
        inputs = {"input_ids": token_T[None]}
    else:
        inputs = {"inputs_embeds": (model.get_input_embeddings()(token_T) + noise_TD)[None]}
    output = backbone(**inputs, position_ids=position_T[None], use_cache=False, attend=attend)
    return output.last_hidden_state[0]
