"""Log-probabilities of a frozen reference, computed once and kept on disk under a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.tensor_layers import digest_of_whole
from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError
from mas_hpc.models.skeleton import saved_tensors
from mas_hpc.training.network import Network
from mas_hpc.types import Sample

COLUMN = "reference_logprob"
Annotate = Callable[..., list[Sample]]
"""Network.annotate of certain ranks."""


def with_reference(
    samples: Sequence[Sample], network: Network, world: World, *, cache: Path, annotate: Annotate | None = None
) -> list[Sample]:  # fmt: skip
    """Give every sample the column reference_logprob under the network's present weights (DPO's reference policy).

    The file in `cache` is named by a hash of the weights, the samples' tokens and their layout, so that it can only be
    found again for the same numbers. `annotate` computes them where the network itself does not. Collective.
    Raises CheckpointError for a damaged file.
    """
    digest = digest_of_whole(world, network.model, lambda: _digest(samples, network))
    file = cache / f"{digest}.safetensors"
    if all(line == "found" for line in gather_lines(world, ["found" if file.is_file() else "absent"])):
        return _attach(samples, _read(file, samples))
    annotate = annotate or partial(network.annotate, world=world)
    annotated = annotate(samples, column=COLUMN, read="logprob")
    if world.is_first:
        cache.mkdir(parents=True, exist_ok=True)
        values = torch.tensor([value for sample in annotated for value in sample.columns[COLUMN]], dtype=torch.float64)
        unfinished = file.with_suffix(f".{uuid4().hex}")  # another run may be writing the same file
        save_file({COLUMN: values}, unfinished)
        unfinished.rename(file)
    return annotated


def _digest(samples: Sequence[Sample], network: Network) -> str:
    digest = hashlib.blake2b(digest_size=16)
    model, source = network.model, network.source
    _add_weights(digest, saved_tensors(model, source) if source else sorted(model.state_dict().items()))
    digest.update(json.dumps(_layout(network), default=str).encode())
    for sample in samples:
        masked = [int(trained) for trained in sample.loss_mask]
        row = [sample.policy, sample.prompt_ids, sample.prompt_spans, sample.completion_ids, masked]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def weights_digest(*models: PreTrainedModel) -> str:
    """Names the weights, adapters included, by their bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for model in models:
        _add_weights(digest, sorted(model.state_dict().items()))
    return digest.hexdigest()


def _add_weights(digest: hashlib.blake2b, weights: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _layout(network: Network) -> list[object]:
    """What turns weights and tokens into log-probabilities, beside the code."""
    architecture = network.model.config.to_dict()
    del architecture["_name_or_path"]  # the same weights elsewhere are the same model
    bank = network.bank
    adapters = (bank.policies, bank.rank, bank.alpha, bank.rank_stabilized) if bank else ()
    return [architecture, network.scope, network.temperature, adapters]


def _read(file: Path, samples: Sequence[Sample]) -> list[float]:
    try:
        values = load_file(file)[COLUMN].tolist()
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged reference log-probabilities ({error}); delete the file") from None
    if len(values) != sum(len(sample.completion_ids) for sample in samples):
        raise CheckpointError(f"{file}: holds {len(values)} values, not one a completion token; delete the file")
    return values


def _attach(samples: Sequence[Sample], values: Sequence[float]) -> list[Sample]:
    remaining = iter(values)
    return [
        replace(sample, columns={**sample.columns, COLUMN: tuple(next(remaining, math.nan) for _ in sample.completion_ids)})
        for sample in samples
    ]
