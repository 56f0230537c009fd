"""A model without memory for its weights, on torch's meta device: ranks that share it out read their own parts of the files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mas_hpc.config import ModelConfig
from mas_hpc.errors import CheckpointError
from mas_hpc.models.load import finished, model_folder

Shapes = dict[str, tuple[Path, tuple[int, ...]]]
"""File and shape of tensors by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model on meta, and where its weights are.

    Example: Skeleton(model=model, folder=Path("models/llama"))
    """

    model: PreTrainedModel
    """As load_model gives it, but its parameters have no memory; buffers, such as rotary frequencies, have."""
    folder: Path
    """Its safetensors files hold every parameter under the model's own name."""


def build_skeleton(config: ModelConfig) -> Skeleton | str:
    """The skeleton of the model that load_model would load, or why there is none.

    Raises ConfigError as load_model does, CheckpointError for files that cannot be read.
    """
    folder = model_folder(config)
    if folder is None:
        return "it is built in code, not read from files"
    try:
        saved = shapes(folder)
        shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=config.trust_remote_code)
    except SafetensorError as error:
        raise CheckpointError(f"model.path={config.path!r}: damaged weights ({error}); copy the model again") from None
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())[:200]  # the usual loader says what is wrong
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
    differing = [
        name for name, tensor in model.named_parameters() if name not in saved or saved[name][1] != tuple(tensor.shape)
    ]
    if differing:
        return f"its files do not hold {differing[0]} as the model names it"
    if odd := _odd_buffers(model):
        return f"{odd} has buffers that only its own loader can fill"
    _fill_buffers(model)
    return Skeleton(model=finished(model), folder=folder)


def shapes(folder: Path) -> Shapes:
    """What the folder's safetensors files hold. Raises SafetensorError for a damaged one."""
    found: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            found |= {name: (file, tuple(stream.get_slice(name).get_shape())) for name in stream.keys()}  # noqa: SIM118
    return found


def saved_tensors(model: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What model.state_dict() would hold, one at a time, by name, in its types; adapters as they are in memory."""
    saved = shapes(folder)
    aliases = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not tensor.is_meta:
            yield name, tensor.detach()
            continue
        own = aliases[id(tensor)]
        with safe_open(saved[own][0], framework="pt") as stream:
            yield name, stream.get_tensor(own).to(tensor.dtype)


def _odd_buffers(model: PreTrainedModel) -> str:
    """The first module, if there is one, whose buffers are saved with the weights or lie beside weights of its own."""
    saved = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    mixed = [
        name for name, module in model.named_modules()
        if [*module.buffers(recurse=False)] and [*module.parameters(recurse=False)]
    ]  # fmt: skip
    return next(iter([*sorted(saved), *mixed]), "")


def _fill_buffers(model: PreTrainedModel) -> None:
    """Give buffers memory and the values that the architecture computes: transformers does so when it loads weights."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if buffers:
            initialize: Any = model._init_weights
            initialize(module)
