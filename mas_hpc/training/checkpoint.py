"""Trained weights on disk, in the formats that everybody reads: safetensors, and PEFT for adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mas_hpc.models.adapters import AdapterBank


def save(folder: Path, model: PreTrainedModel, tokenizer: Any, bank: AdapterBank | None, *, base_model: str) -> Path:
    """Write `folder`/model, or `folder`/adapters/<policy> when adapters were trained. Complete or absent: renamed into place.

    Load it again with model.path=<folder>/model, or adapters.path=<folder>/adapters.
    """
    target = folder / ("adapters" if bank else "model")
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if bank:
        for policy in bank.policies:
            bank.export(policy, unfinished / policy, base_model=base_model)
    else:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    return target
