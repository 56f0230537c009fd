"""Attention along a forest of tokens on a CPU: each attends to itself and its ancestors, and no T x T mask is ever built.

`tree_blocks` plans the calls. A query that a block and several prefixes serve gets one softmax over all of its keys: each
call also returns the log of its softmax's denominator, by which results are weighed and summed (as FlashAttention does from
tile to tile, arXiv 2205.14135). With the denominator of the sum a call's backward pass gives that call's part of the gradient.
Both passes are therefore calls of the op below torch's scaled_dot_product_attention, which is not part of its public interface.
Legend: T tree tokens, N queries, H query heads, K key/value heads, D head dimension, B blocks of a batch, Q and P its padded
queries and keys, X padded rows of all batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mas_hpc.models.tree_blocks import BLOCK, SHARED, batched, cut, padded, pruned
from mas_hpc.prefix_tree import IntArray

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_gather_backward = torch.ops.aten.embedding_dense_backward  # far faster than that of index_select

Heads = tuple[Tensor, Tensor, Tensor]
"""Rows of queries, keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCall:
    """Rows of the keys of a prefix, and of the queries that see them."""

    keys: slice | Tensor
    queries: slice

    def parts(self, heads: Heads) -> list[Tensor]:
        """Query, key and value of the call, [1, heads, Q or P, D]."""
        return [_heads(rows[chosen]) for rows, chosen in zip(heads, (self.queries, self.keys, self.keys), strict=True)]


class TreeAttention:
    """An `Attend` over one forest; planned once, used by every layer, in recomputation and in the backward pass.

    `queries` are the tree indices that attend, increasing: the rows of the queries and of the output. All tokens are keys.

    Example: TreeAttention(merge([[1, 2, 3], [1, 2, 4]]).leave_T)
    """

    def __init__(
        self, leave_T: IntArray | Tensor, *, queries: IntArray | None = None, limit: int = BLOCK, shared: int = SHARED,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """`device` is that of the heads."""
        leave_T = np.asarray(leave_T.cpu() if isinstance(leave_T, Tensor) else leave_T)
        kept, leave_M, query_N = pruned(leave_T, np.arange(len(leave_T)) if queries is None else queries)
        blocks, prefixes = cut(leave_M, query_N, limit=limit, shared=shared)
        batches = [padded(group, leave_M) for group in batched(blocks)]
        query_X = np.concatenate([batch.query_BQ.ravel() for batch in batches])
        key_X = np.concatenate([batch.key_BP.ravel() for batch in batches])
        real = np.flatnonzero(query_X >= 0)
        self._query_X = _gather_index(np.searchsorted(query_N, query_X), len(query_N), device)
        self._key_X = _gather_index(kept[key_X], len(leave_T), device)
        self._place_N = _gather_index(real[np.argsort(query_X[real])], len(query_X), device)
        self._padding = torch.from_numpy(np.flatnonzero(query_X < 0)).to(device)
        self._query_shapes = [batch.query_BQ.shape for batch in batches]
        self._key_shapes = [batch.key_BP.shape for batch in batches]
        self._visible = [None if batch.visible_BQP is None else batch.visible_BQP.to(device) for batch in batches]
        self._prefixes = [
            PrefixCall(keys=_slice_or_index(kept[prefix.keys], device), queries=slice(prefix.first, prefix.last))
            for prefix in prefixes
        ]
        self._bias: list[Tensor | None] = []

    def __call__(self, layer: int, query_HND: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        """Return the attended values, [N, H, D]."""
        rows = (_packed_rows(heads.transpose(0, 1)) for heads in (query_HND, key_KTD, value_KTD))
        return _Attention.apply(self, scaling, *rows)  # type: ignore[no-any-return]

    def forward(self, heads: Heads, scaling: float) -> tuple[Tensor, Tensor]:
        """The attended values, [N, H, D], and the log of each softmax's denominator, [N, H]."""
        outputs, logs = [], []
        for *parts, bias in self._calls(heads):
            output_BHQD, log_BHQ = _attend(*parts, 0.0, bias is None, attn_mask=bias, scale=scaling)
            outputs.append(_rows(output_BHQD))
            logs.append(_rows(log_BHQ))
        log_NH = _gather(torch.cat(logs), self._place_N)
        output_NHD = _gather(torch.cat(outputs), self._place_N).to(log_NH.dtype)
        for prefix in self._prefixes:
            output_1HQD, log_1HQ = _attend(*prefix.parts(heads), 0.0, False, scale=scaling)
            log_QH, queries = _rows(log_1HQ), prefix.queries
            share_QH = torch.sigmoid(log_QH - log_NH[queries])
            output_NHD[queries].lerp_(_rows(output_1HQD).to(log_NH.dtype), share_QH[..., None])
            log_NH[queries] = torch.logaddexp(log_NH[queries], log_QH)
        return output_NHD.to(heads[0].dtype), log_NH

    def backward(self, grad_NHD: Tensor, heads: Heads, output_NHD: Tensor, log_NH: Tensor, scaling: float) -> Heads:
        """Gradients of queries, keys and values; `output_NHD` and `log_NH` as `forward` returned them."""
        grad_X, output_X, log_X = (_gather(rows, self._query_X) for rows in (grad_NHD, output_NHD, log_NH))
        if len(self._padding):
            grad_X[self._padding] = 0
            log_X[self._padding] = torch.inf  # of a padded query no key has any weight
        found: list[list[Tensor]] = []
        given = zip(*(_split(rows, self._query_shapes) for rows in (grad_X, output_X, log_X)), strict=True)
        for (*parts, bias), (grad, output, log) in zip(self._calls(heads), given, strict=True):
            grads = _attend_backward(grad, *parts, output, log, 0.0, bias is None, attn_mask=bias, scale=scaling)
            found.append([_rows(part) for part in grads])
        query_X, key_X, value_X = map(torch.cat, zip(*found, strict=True))
        found_NHD = _gather(query_X, self._place_N)
        key_TKD, value_TKD = (_scatter(rows, self._key_X, len(heads[1])) for rows in (key_X, value_X))
        for prefix in self._prefixes:
            grad, output, log = (_heads(rows[prefix.queries]) for rows in (grad_NHD, output_NHD, log_NH))
            grads = _attend_backward(grad, *prefix.parts(heads), output, log, 0.0, False, scale=scaling)
            found_NHD[prefix.queries] += _rows(grads[0])
            key_TKD[prefix.keys] += _rows(grads[1])
            value_TKD[prefix.keys] += _rows(grads[2])
        return found_NHD, key_TKD, value_TKD

    def _calls(self, heads: Heads) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Query, key and value of each batch, [B, heads, Q or P, D], and its mask.

        The backward pass copies the rows again: keeping the copies would double what a layer keeps of its attention.
        """
        shapes = (self._query_shapes, self._key_shapes, self._key_shapes)
        indices = (self._query_X, self._key_X, self._key_X)
        parts = (_split(_gather(rows, index), shape) for rows, index, shape in zip(heads, indices, shapes, strict=True))
        return zip(*parts, self._biases(heads[0].dtype), strict=True)

    def _biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Additive masks, which is what the op takes."""
        if not self._bias or any(bias is not None and bias.dtype != dtype for bias in self._bias):
            self._bias = [None if seen is None else _bias(seen, dtype) for seen in self._visible]
        return self._bias


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: TreeAttention, scaling: float, query_NHD: Tensor, key_TKD: Tensor, value_TKD: Tensor
    ) -> Tensor:  # fmt: skip
        output_NHD, log_NH = plan.forward((query_NHD, key_TKD, value_TKD), scaling)
        ctx.plan, ctx.scaling = plan, scaling
        ctx.save_for_backward(query_NHD, key_TKD, value_TKD, output_NHD, log_NH)
        return output_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        *heads, output_NHD, log_NH = ctx.saved_tensors
        return None, None, *ctx.plan.backward(_packed_rows(grad_NHD), heads, output_NHD, log_NH, ctx.scaling)


def _packed_rows(rows: Tensor) -> Tensor:
    """The op reads neighbours in memory as neighbours of the last dimension, whatever its stride."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _bias(visible_BQP: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible_BQP, dtype=dtype).masked_fill_(~visible_BQP, -torch.inf)[:, None]


def _gather_index(index: IntArray, num_rows: int, device: torch.device | str) -> Tensor | None:
    """None when it takes each of `num_rows` rows in order."""
    return None if np.array_equal(index, np.arange(num_rows)) else torch.from_numpy(index).to(device)


def _slice_or_index(index: IntArray, device: torch.device | str) -> slice | Tensor:
    """Increasing rows, as a slice if they are neighbours: that copies nothing."""
    first, last = int(index[0]), int(index[-1]) + 1
    return slice(first, last) if last - first == len(index) else torch.from_numpy(index).to(device)


def _gather(rows: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return rows
    return rows.flatten(1).index_select(0, index).unflatten(1, rows.shape[1:])  # of more dimensions it is far slower


def _scatter(rows_XKD: Tensor, index: Tensor | None, num_rows: int) -> Tensor:
    """The sum of the rows of each index, [num_rows, K, D]."""
    if index is None:
        return rows_XKD
    return _gather_backward(rows_XKD.flatten(1), index, num_rows, -1, False).view(num_rows, *rows_XKD.shape[1:])


def _split(rows_X: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The rows of each batch, [B, heads, Q or P, ...]."""
    parts = rows_X.split([count * width for count, width in shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _rows(heads_BHQ: Tensor) -> Tensor:
    """The inverse for one batch, [B Q, heads, ...]."""
    return heads_BHQ.transpose(1, 2).flatten(0, 1)


def _heads(rows_XHD: Tensor) -> Tensor:
    """As a batch of one, [1, heads, rows, ...]."""
    return rows_XHD.transpose(0, 1)[None]
