"""Trained weights on disk, in the formats that everybody reads: safetensors, and PEFT for adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.heads import ScalarHead
from mas_hpc.training.network import Network


def save(folder: Path, network: Network, tokenizer: Any, *, base_model: str, base_trained: bool) -> None:
    """Write `folder`/model, and `folder`/adapters/<policy> with a bank; each complete or absent: renamed into place.

    With a bank the model is the base, written only if it was trained: its adapters fit no other one. Load them again with
    model.path=<folder>/model and adapters.path=<folder>/adapters.
    A scalar head goes beside the model, which with a bank then has the adapter of the first policy merged in; the base, if
    it was trained, is <folder>/base.
    """
    model, bank, head = network.model, network.bank, network.head
    base = folder / ("base" if bank is not None and head is not None else "model")

    def write_model(weights: dict[str, Tensor], target: Path) -> None:
        model.save_pretrained(target, state_dict=weights)
        tokenizer.save_pretrained(target)

    def write_scorer(weights: dict[str, Tensor], head: ScalarHead, target: Path) -> None:
        write_model(weights, target)
        head.save(target)

    def write_adapters(bank: AdapterBank, target: Path) -> None:
        for policy in bank.policies:
            bank.export(policy, target / policy, base_model=str(base) if base_trained else base_model)

    plain = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    if base_trained if bank is not None else head is None:
        _publish(base, partial(write_model, plain))
    if head is not None:
        weights = plain if bank is None else bank.merged_state_dict(model, bank.policies[0])
        _publish(folder / "model", partial(write_scorer, weights, head))
    if bank is not None:
        _publish(folder / "adapters", partial(write_adapters, bank))


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
