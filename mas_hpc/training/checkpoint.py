"""Trained weights on disk, in the formats that everybody reads: safetensors, and PEFT for adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mas_hpc.models.adapters import AdapterBank


def save(
    folder: Path, model: PreTrainedModel, tokenizer: Any, bank: AdapterBank | None, *, base_model: str, base_trained: bool
) -> None:
    """Write `folder`/model, and `folder`/adapters/<policy> with a bank; each complete or absent: renamed into place.

    With a bank the model is the base, written only if it was trained: its adapters fit no other one.
    Load them again with model.path=<folder>/model and adapters.path=<folder>/adapters.
    """

    def write_model(target: Path) -> None:
        weights = {name: tensor for name, tensor in model.state_dict().items() if not bank or ".lora_" not in name}
        model.save_pretrained(target, state_dict=weights)
        tokenizer.save_pretrained(target)

    def write_adapters(bank: AdapterBank, target: Path) -> None:
        for policy in bank.policies:
            bank.export(policy, target / policy, base_model=str(folder / "model") if base_trained else base_model)

    if bank is None or base_trained:
        _publish(folder / "model", write_model)
    if bank is not None:
        _publish(folder / "adapters", partial(write_adapters, bank))


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
