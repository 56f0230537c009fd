"""Tree attention on accelerators: one FlexAttention call over the flat row, masked by the intervals of the forest.

It has never run on a GPU here: its tests run the same mask through FlexAttention's eager mode and its CPU compiler.
The block mask is made from the intervals, not by evaluating T x T pairs as `create_block_mask` would.
Legend: T tree tokens, N queries, H query heads, K key/value heads, D head dimension, I query blocks, J key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from mas_hpc.models.attention import Attend
from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.prefix_tree import IntArray

FLEX_DEVICES = ("cuda", "xpu")
"""Device types for which FlexAttention has kernels with a backward pass."""
TILE = 128
"""Queries and keys of a block: FlexAttention's default. Rows are padded to whole blocks, so few lengths are compiled for."""

Grid = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def tree_attention(
    leave_T: IntArray | Tensor, *, queries: IntArray | None = None, device: torch.device | str = "cpu"
) -> Attend:
    """The `Attend` over one forest that suits the device: FlexAttention on accelerators, blocks of SDPA elsewhere.

    `queries` are the increasing tree indices that attend; default all.
    Example: tree_attention(merge([[1, 2, 3], [1, 2, 4]]).leave_T, device="cpu")
    """
    if torch.device(device).type in FLEX_DEVICES:
        return FlexTreeAttention(leave_T, queries=queries, device=device, function=_compiled())
    return TreeAttention(leave_T, queries=queries, device=device)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


class FlexTreeAttention:
    """An `Attend` over one forest: planned once, used by every layer. `function` is flex_attention, compiled or not."""

    def __init__(
        self, leave_T: IntArray | Tensor, *, queries: IntArray | None = None, device: torch.device | str = "cpu",
        function: Callable[..., Tensor] = flex_attention,
    ) -> None:  # fmt: skip
        leave_T = np.asarray(leave_T.cpu() if isinstance(leave_T, Tensor) else leave_T)
        query_N = np.arange(len(leave_T)) if queries is None else queries
        self._mask = block_mask(leave_T, query_N, device)
        self._function = function

    def __call__(self, layer: int, query_HND: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [N, H, D]."""
        num_queries, num_keys = self._mask.seq_lengths
        query = _padded(query_HND, num_queries)
        key, value = _padded(key_KTD, num_keys), _padded(value_KTD, num_keys)
        output_1HND = self._function(query, key, value, block_mask=self._mask, scale=scaling, enable_gqa=True)
        return output_1HND[0, :, : query_HND.shape[1]].transpose(0, 1)


def _padded(heads_HTD: Tensor, length: int) -> Tensor:
    return pad(heads_HTD, (0, 0, 0, length - heads_HTD.shape[1]))[None]


def block_mask(leave_T: IntArray, query_N: IntArray, device: torch.device | str) -> BlockMask:
    """The mask of a forest for queries `query_N` (increasing tree indices), both sides padded to whole blocks.

    Padded keys are hidden; padded queries see what the last one sees, so that no softmax is over nothing.
    """
    touched_IJ, full_IJ = block_grids(leave_T, query_N)
    place = torch.as_tensor(np.pad(query_N, (0, -len(query_N) % TILE), mode="edge"), device=device)
    leave = torch.as_tensor(np.pad(leave_T, (0, -len(leave_T) % TILE)), device=device)

    def is_ancestor(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= place[query]) & (place[query] < leave[key])

    return BlockMask.from_kv_blocks(
        *_ordered(touched_IJ & ~full_IJ, device), *_ordered(full_IJ, device),
        BLOCK_SIZE=TILE, mask_mod=is_ancestor, seq_lengths=(len(place), len(leave)),
    )  # fmt: skip


def block_grids(leave_T: IntArray, query_N: IntArray, tile: int = TILE) -> tuple[Grid, Grid]:
    """Which blocks hold a visible pair, and which hold no other; booleans, [I, J].

    The queries that see a key are neighbours in `query_N`, so the blocks that it reaches are an interval, too, and
    counting how many keys of a block reach a block of queries is a running sum of interval ends.
    """
    shape = -(-len(query_N) // tile), -(-len(leave_T) // tile)
    key_T = np.flatnonzero(np.searchsorted(query_N, leave_T) > np.searchsorted(query_N, np.arange(len(leave_T))))
    start_T, stop_T = np.searchsorted(query_N, key_T), np.searchsorted(query_N, leave_T[key_T])
    # The last block of queries is whole as soon as its real queries are.
    whole_stop_T = np.where(stop_T == len(query_N), shape[0], stop_T // tile)
    reached_IJ = _counts(start_T // tile, -(-stop_T // tile), key_T // tile, shape)
    covered_IJ = _counts(-(-start_T // tile), whole_stop_T, key_T // tile, shape)
    return reached_IJ > 0, covered_IJ == tile


def _counts(start_T: IntArray, stop_T: IntArray, column_T: IntArray, shape: tuple[int, int]) -> IntArray:
    """How many intervals start..stop of a column contain each row; empty ones may end before they start."""
    steps = np.zeros((shape[0] + 1, shape[1]), dtype=np.int64)
    np.add.at(steps, (start_T, column_T), 1)
    np.add.at(steps, (np.maximum(start_T, stop_T), column_T), -1)
    return cast(IntArray, steps.cumsum(0)[:-1])


def _ordered(grid_IJ: Grid, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a grid: for each row how many columns are set, and the columns with those first."""
    order = np.argsort(~grid_IJ, axis=1, kind="stable")
    counts, columns = (torch.as_tensor(part.astype(np.int32), device=device)[None, None] for part in (grid_IJ.sum(1), order))
    return counts, columns
