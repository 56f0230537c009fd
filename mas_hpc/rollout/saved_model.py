"""A model on disk for an engine that holds a copy of it, and what may take the place of its tensors later."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mas_hpc.errors import CheckpointError
from mas_hpc.models.adapters import AdapterBank

Shapes = dict[str, tuple[int, ...]]
"""Of tensors, by name."""


def save_for_serving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bank: AdapterBank | None, folder: Path
) -> tuple[Path, dict[str, Path]]:
    """Write the model without its adapters, the tokenizer, and each adapter; return the folders, each policy's too.

    Of several ranks the first calls it (transformers writes on no other), and all start vLLM when it has returned.
    Raises CheckpointError when an adapter cannot be written.
    Example: model_folder, policies = save_for_serving(model, tokenizer, bank, folder)
    """
    base = folder / "model"
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    model.save_pretrained(base, state_dict=weights)
    tokenizer.save_pretrained(base)
    policies = {policy: folder / "adapters" / policy for policy in (bank.policies if bank else ())}
    for policy, place in policies.items():
        assert bank is not None
        bank.export(policy, place, base_model=str(base))
    return base, policies


def shapes_in(file: Path) -> Shapes:
    """Shapes of the tensors in a safetensors file, by name."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def check_shape(what: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> None:
    """Raise CheckpointError, naming the tensor, when the shapes differ; None: there is no such tensor."""
    if found != expected:
        raise CheckpointError(
            f"weights of {what} has shape {found or 'missing'}, expected {expected or 'no such tensor'}; they are of another "
            "model: give both sides the same model.path and adapters"
        )


def check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    """Raise CheckpointError, naming the tensor, when it is of another type."""
    if tensor.dtype != expected:
        raise CheckpointError(
            f"weights: {name} is {tensor.dtype}, but the engine serves {expected}; give both sides the same model.dtype"
        )
