"""Samples packed into one forest of tokens, and the flat list of tokens that are trained on it.

Legend: T tree tokens, N trained tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_hpc.errors import DataError
from mas_hpc.prefix_tree import IntArray, common_length, merge
from mas_hpc.types import Sample

Scope = Literal["sequence", "speaker"]
"""Which tokens an adapter covers: `sequence` prompt and completion, `speaker` those that its policy wrote."""
BASE = -1


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """A forest in depth-first order (a token's index is where it enters) and the tokens predicted along it.

    Example: (1, 2) with completions (3, 9) and (4,): token_T [1, 2, 3], predictor_N [1, 2, 1], target_N [3, 9, 4].
    """

    token_T: Tensor
    position_T: Tensor
    """Depth in the path, from 0."""
    leave_T: Tensor
    """End of the token's subtree: token k is an ancestor-or-self of q iff k <= q < leave_T[k]."""
    parent_T: Tensor
    adapter_T: Tensor
    """Index of the adapter of each token; -1 is the base model."""
    predictor_N: Tensor
    """Tree index whose hidden state predicts the target."""
    target_N: Tensor
    sample_N: Tensor
    """Row in the list of samples that was packed; samples without a completion have no target."""
    behavior_logprob_N: Tensor
    """float32, natural log; nan where the sample has none."""
    advantage_N: Tensor
    """float32; of the sequence, unless the samples have a column `advantage`."""
    column_N: Mapping[str, Tensor]
    """The samples' other columns, float32."""
    label_S: Tensor
    """float32, S = num_samples; nan where the sample has none."""
    margin_S: Tensor
    num_samples: int

    def __len__(self) -> int:
        return len(self.token_T)

    def to(self, device: torch.device | str) -> TokenTree:
        """The same tree with its tensors on `device`."""
        tensors = (field.name for field in fields(self) if field.name not in ("num_samples", "column_N"))
        columns = {name: column.to(device) for name, column in self.column_N.items()}
        return replace(self, column_N=columns, **{name: getattr(self, name).to(device) for name in tensors})


def pack(samples: Sequence[Sample], *, adapters: Mapping[str, int], scope: Scope) -> TokenTree:
    """Merge the samples' paths into one forest. A policy that `adapters` does not name is the base model.

    Each path ends where its last target is predicted: the last token is run only if another path continues through it.
    Raises DataError for a completion without a prompt or without a trained token, for lengths that disagree, and when
    nothing is left to train on.
    """
    paths = [_path(sample, adapters, scope) for sample in samples]
    tree = merge([tokens for tokens, _ in paths], [adapter for _, adapter in paths])
    trained = [_trained(sample) for sample in samples]
    counts = [len(positions) for positions in trained]
    if not any(counts):
        raise DataError(f"none of {len(samples)} samples has a completion token to train on: leave the batch out")
    predictors = [index[at - 1] for index, at in zip(tree.path_index, trained, strict=True)]
    targets = [np.array(_ids(sample), dtype=np.int64)[at] for sample, at in zip(samples, trained, strict=True)]
    columns = _columns(samples, [at - len(sample.prompt_ids) for sample, at in zip(samples, trained, strict=True)])
    sequence_advantage = torch.from_numpy(np.repeat([sample.advantage for sample in samples], counts)).float()
    arrays = (tree.token_T, tree.position_T, tree.leave_T, tree.parent_T, tree.adapter_T)
    token_T, position_T, leave_T, parent_T, adapter_T = (torch.from_numpy(array.copy()) for array in arrays)
    return TokenTree(
        token_T=token_T, position_T=position_T, leave_T=leave_T, parent_T=parent_T, adapter_T=adapter_T,
        predictor_N=torch.from_numpy(np.concatenate(predictors)),
        target_N=torch.from_numpy(np.concatenate(targets)),
        sample_N=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        behavior_logprob_N=columns.pop("behavior_logprob"),
        advantage_N=columns.pop("advantage", sequence_advantage),
        column_N=columns,
        label_S=torch.tensor([sample.label for sample in samples], dtype=torch.float32),
        margin_S=torch.tensor([sample.margin for sample in samples], dtype=torch.float32),
        num_samples=len(samples),
    )  # fmt: skip


def split(
    samples: Sequence[Sample], *, max_tokens: int, adapters: Mapping[str, int] | None = None, scope: Scope = "sequence",
    whole: bool = False,
) -> list[list[Sample]]:  # fmt: skip
    """Divide samples into forests of at most `max_tokens` tree tokens, nothing truncated; order of trees is kept.

    A tree that is larger is divided between its samples in path order, or with `whole` is a part alone, its samples in
    their own order; a sample larger than the budget is a part alone.
    `adapters` and `scope` as in `pack`: an adapter that covers prompts makes a tree larger.
    """
    by_tree: dict[str, list[Sample]] = {}
    for sample in samples:
        by_tree.setdefault(sample.tree, []).append(sample)
    forests: list[list[Sample]] = []
    filled = 0
    for members in by_tree.values():
        for part, size in _parts(members, sys.maxsize if whole else max_tokens, adapters or {}, scope):
            if not forests or filled + size > max_tokens:
                forests.append([])
                filled = 0
            forests[-1] += part
            filled += size
    return forests


def _parts(
    members: Sequence[Sample], max_tokens: int, adapters: Mapping[str, int], scope: Scope
) -> Iterator[tuple[list[Sample], int]]:
    """Yield (samples, tree tokens): all members if they fit, else runs of them in path order, as long as fit."""
    keys = [list(zip(*_path(sample, adapters, scope), strict=True)) for sample in members]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    part: list[int] = []
    parts: list[tuple[list[int], int]] = []
    size = 0
    for index in order:
        # In path order a path shares most with the one before it.
        added = len(keys[index]) - (common_length(keys[index], keys[part[-1]]) if part else 0)
        if part and size + added > max_tokens:
            parts.append((part, size))
            part, size, added = [], 0, len(keys[index])
        part.append(index)
        size += added
    parts.append((part, size))
    for part, size in parts:
        yield [members[index] for index in (sorted(part) if len(parts) == 1 else part)], size


def _ids(sample: Sample) -> tuple[int, ...]:
    return sample.prompt_ids + sample.completion_ids


def _trained(sample: Sample) -> IntArray:
    """Positions in prompt + completion that are trained on."""
    mask = sample.loss_mask or (True,) * len(sample.completion_ids)
    _check_length(sample, "loss_mask", len(mask))
    if sample.completion_ids and not any(mask):
        raise DataError(f"sample {sample.id}: loss_mask trains none of {len(mask)} completion tokens; leave the sample out")
    if sample.completion_ids and not sample.prompt_ids:
        raise DataError(f"sample {sample.id}: empty prompt, so nothing predicts the first completion token; begin it with BOS")
    return len(sample.prompt_ids) + np.flatnonzero(mask)


def _columns(samples: Sequence[Sample], offsets: Sequence[IntArray]) -> dict[str, Tensor]:
    """Each column at the trained tokens of all samples: `offsets` are theirs in the completions."""
    names = {name for sample in samples for name in sample.columns} | {"behavior_logprob"}
    return {
        name: torch.from_numpy(
            np.concatenate([_column(sample, name)[at] for sample, at in zip(samples, offsets, strict=True)])
        ).float()
        for name in sorted(names)
    }


def _column(sample: Sample, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """nan where the sample has no behaviour log-probs. Raises DataError when another column is absent."""
    if name == "behavior_logprob":
        values = sample.behavior_logprobs or (np.nan,) * len(sample.completion_ids)
        _check_length(sample, "behavior_logprobs", len(values))
        return np.array(values, dtype=np.float64)
    if name not in sample.columns:
        raise DataError(f"sample {sample.id}: no column {name!r}, which others of its batch have; give it to all or none")
    _check_length(sample, f"columns[{name!r}]", len(sample.columns[name]))
    return np.array(sample.columns[name], dtype=np.float64)


def _check_length(sample: Sample, name: str, length: int) -> None:
    if length != len(sample.completion_ids):
        expected = len(sample.completion_ids)
        raise DataError(
            f"sample {sample.id}: {name} has {length} values for {expected} completion tokens; give one each or none"
        )


def _path(sample: Sample, adapters: Mapping[str, int], scope: Scope) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that are run for a sample, as far as its last prediction, and the adapter of each."""
    trained = _trained(sample)
    length = int(trained[-1]) if len(trained) else 0
    return _ids(sample)[:length], _token_adapters(sample, adapters, scope)[:length]


def _token_adapters(sample: Sample, adapters: Mapping[str, int], scope: Scope) -> tuple[int, ...]:
    own = adapters.get(sample.policy, BASE)
    if scope == "sequence":
        return (own,) * len(_ids(sample))
    if (total := sum(length for _, length in sample.prompt_spans)) != len(sample.prompt_ids):
        raise DataError(
            f"sample {sample.id}: prompt_spans add up to {total}, not to the {len(sample.prompt_ids)} prompt tokens, "
            "so speaker scope cannot tell who wrote what; record them or use adapter scope `sequence`"
        )
    prompt = [adapters.get(policy, BASE) for policy, length in sample.prompt_spans for _ in range(length)]
    return (*prompt, *(own,) * len(sample.completion_ids))
