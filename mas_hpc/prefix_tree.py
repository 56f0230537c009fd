"""Paths of tokens merged into a forest: the one structure behind KV sharing in rollout and tree attention in training.

Two tokens are one node iff token, adapter and the whole path above are equal. Legend: T tree tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """A forest in depth-first order, so that every subtree is one interval of indices.

    Example: merge([[1, 2, 3], [1, 2, 4]]) has tokens [1, 2, 3, 4], parents [-1, 0, 1, 1], positions [0, 1, 2, 2].
    """

    token_T: IntArray
    adapter_T: IntArray
    position_T: IntArray
    """Depth in the path, from 0."""
    parent_T: IntArray
    """Index of the previous token of the path; -1 at a root."""
    leave_T: IntArray
    """End of the token's subtree: token k is an ancestor-or-self of q iff k <= q < leave_T[k]."""
    path_index: tuple[IntArray, ...]
    """For each input path, the tree index of each of its tokens."""

    def __len__(self) -> int:
        return len(self.token_T)


def merge(paths: Sequence[Sequence[int]], adapters: Sequence[Sequence[int]] | None = None) -> PrefixTree:
    """Merge paths into one forest; `adapters[i][j]` adapts token j of path i (-1: the base model, the default).

    Raises ValueError when a path and its adapters differ in length.
    """
    adapters = adapters or [[-1] * len(path) for path in paths]
    keys = [list(zip(path, adapter, strict=True)) for path, adapter in zip(paths, adapters, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    path_index: list[IntArray] = [np.zeros(0, dtype=np.int64)] * len(keys)
    nodes: list[tuple[int, int, int, int]] = []  # token, adapter, position, parent
    above: list[tuple[int, int]] = []
    above_index = np.zeros(0, dtype=np.int64)
    for current in order:
        key = keys[current]
        shared = common_length(key, above)
        start = len(nodes) - shared
        index = np.concatenate([above_index[:shared], np.arange(start + shared, start + len(key), dtype=np.int64)])
        path_index[current] = index
        for position in range(shared, len(key)):
            parent = int(index[position - 1]) if position else -1
            nodes.append((*key[position], position, parent))
        above, above_index = key, index
    columns = np.array(nodes, dtype=np.int64).reshape(-1, 4).T
    return PrefixTree(
        token_T=columns[0], adapter_T=columns[1], position_T=columns[2], parent_T=columns[3],
        leave_T=_subtree_ends(columns[3]), path_index=tuple(path_index),
    )  # fmt: skip


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Number of equal leading items."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _subtree_ends(parent_T: IntArray) -> IntArray:
    leave_T = np.arange(1, len(parent_T) + 1, dtype=np.int64)
    for index in range(len(parent_T) - 1, -1, -1):
        parent = parent_T[index]
        if parent >= 0:
            leave_T[parent] = max(leave_T[parent], leave_T[index])
    return leave_T
