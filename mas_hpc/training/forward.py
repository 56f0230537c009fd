"""The one model call of training: a TokenTree in, log-probabilities of its targets out.

Legend: T tree tokens, N trained tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext

from mas_hpc_kernels import linear_logprob
from torch import Tensor
from transformers import PreTrainedModel

from mas_hpc.data.token_tree import TokenTree
from mas_hpc.errors import ConfigError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import hidden_states
from mas_hpc.models.tree_attention import TreeAttention


def forward(
    model: PreTrainedModel,
    tree: TokenTree,
    *,
    bank: AdapterBank | None = None,
    temperature: float = 1.0,
    need_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (logprob_N, entropy_N) of the targets; entropy carries no gradient and is None unless needed.

    `attention.prepare` has switched the model. `bank` routes each token to its adapter during the forward alone, so a
    bank does not go with recomputed activations. Raises ConfigError for an LM head that is more than a matrix, and when
    the tree names an adapter but there is no bank.
    """
    weight_VD = head_weight(model)
    if bank is None and int(tree.adapter_T.max()) >= 0:
        raise ConfigError("the samples name an adapter, but the model has no adapter bank: build one or pack with adapters={}")
    attend = TreeAttention(tree.leave_T, device=tree.leave_T.device)
    with nullcontext() if bank is None else bank.route(tree.adapter_T):
        hidden_TD = hidden_states(model, tree.token_T, tree.position_T, attend)
    hidden_ND = hidden_TD[tree.predictor_N]
    return linear_logprob(hidden_ND, weight_VD, tree.target_N, temperature=temperature, need_entropy=need_entropy)


def head_weight(model: PreTrainedModel) -> Tensor:
    """The LM head's matrix, [V, D]. Raises ConfigError when logits are more than hidden @ weight.T."""
    head = model.get_output_embeddings()
    scales = {name: getattr(model.config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")}
    extra = [f"{name}={value}" for name, value in scales.items() if value not in (None, 1.0)]
    if getattr(head, "bias", None) is not None:
        extra.append("a bias")
    if extra:
        raise ConfigError(
            f"model.path: the LM head of {model.config.model_type} has {', '.join(extra)}; log-probabilities are "
            "computed from its matrix alone, so choose a model with a plain linear head"
        )
    return head.weight
