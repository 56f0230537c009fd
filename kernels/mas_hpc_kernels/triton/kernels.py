"""The kernels: logits are made in registers from tiles of hidden states and head, and used there.

Legend: N targets, V vocabulary, D hidden; sizes of tiles: BLOCK_N x BLOCK_V logits, from products over BLOCK_D.
"""
# mypy: allow-untyped-defs
# Arguments have the compiler's types, which Python does not know.

from __future__ import annotations

import triton
import triton.language as tl

NEGLIGIBLE = tl.constexpr(-1e30)
"""operation.NEGLIGIBLE, which see."""


@triton.jit
def statistics_kernel(  # noqa: PLR0913 (a kernel has no records)
    hidden_ND, weight_VD, bias_V, target_N, max_SN, sum_SN, weighted_SN, target_SN,
    num_rows, vocabulary, size, hidden_stride, weight_stride, part, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, s): statistics of the i-th block of rows over the s-th part of the vocabulary (online softmax)."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * part
    target = tl.load(target_N + row_N, mask=row_N < num_rows, other=-1)
    peak = tl.full((BLOCK_N,), NEGLIGIBLE, DTYPE)
    total = tl.zeros((BLOCK_N,), DTYPE)
    weighted = tl.zeros((BLOCK_N,), DTYPE)
    target_logit = tl.zeros((BLOCK_N,), DTYPE)
    for start in range(first, tl.minimum(first + part, vocabulary), BLOCK_V):
        column_V = start + tl.arange(0, BLOCK_V)
        logit, _ = _logits(
            hidden_ND, weight_VD, bias_V, row_N, column_V, num_rows, vocabulary, size, hidden_stride, weight_stride,
            inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP, DTYPE, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        target_logit += tl.sum(tl.where(column_V[None, :] == target[:, None], logit, 0.0), 1)
        # Not maximum(): it may drop a nan.
        logit = tl.where(logit < NEGLIGIBLE, NEGLIGIBLE, logit)
        new_peak = tl.maximum(peak, tl.max(tl.where(column_V[None, :] < vocabulary, logit, NEGLIGIBLE), 1))
        shifted = logit - new_peak[:, None]
        exponential = tl.where(column_V[None, :] < vocabulary, tl.exp(shifted), 0.0)
        shift = peak - new_peak
        weighted = (weighted + total * shift) * tl.exp(shift) + tl.sum(exponential * shifted, 1)
        total = total * tl.exp(shift) + tl.sum(exponential, 1)
        peak = new_peak
    place = tl.program_id(1) * num_rows + row_N
    tl.store(max_SN + place, peak, mask=row_N < num_rows)
    tl.store(sum_SN + place, total, mask=row_N < num_rows)
    tl.store(weighted_SN + place, weighted, mask=row_N < num_rows)
    tl.store(target_SN + place, target_logit, mask=row_N < num_rows)


@triton.jit
def gradient_kernel(  # noqa: PLR0913 (a kernel has no records)
    hidden_ND, weight_VD, bias_V, target_N, max_N, sum_N, mean_N, logprob_grad_N, entropy_grad_N, product_grad_NV,
    num_rows, vocabulary, size, hidden_stride, weight_stride, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, DTYPE: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j): d loss / d (hidden @ weight.T) of a tile, as operation.Backend has it for the logits."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_V = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logit, slope = _logits(
        hidden_ND, weight_VD, bias_V, row_N, column_V, num_rows, vocabulary, size, hidden_stride, weight_stride,
        inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP, DTYPE, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    is_row = row_N < num_rows
    target = tl.load(target_N + row_N, mask=is_row, other=-1)
    peak = tl.load(max_N + row_N, mask=is_row, other=0.0)
    total = tl.load(sum_N + row_N, mask=is_row, other=1.0)
    logprob_grad = tl.load(logprob_grad_N + row_N, mask=is_row, other=0.0)
    shifted = tl.where(logit < NEGLIGIBLE, NEGLIGIBLE, logit) - peak[:, None]
    probability = tl.exp(shifted) / total[:, None]
    is_target = column_V[None, :] == target[:, None]
    grad = logprob_grad[:, None] * (tl.where(is_target, 1.0, 0.0) - probability)
    if HAS_ENTROPY:
        mean = tl.load(mean_N + row_N, mask=is_row, other=0.0)
        entropy_grad = tl.load(entropy_grad_N + row_N, mask=is_row, other=0.0)
        grad -= entropy_grad[:, None] * probability * (shifted - mean[:, None])
    grad *= slope * inverse_temperature
    place = row_N[:, None].to(tl.int64) * vocabulary + column_V[None, :]
    is_tile = is_row[:, None] & (column_V[None, :] < vocabulary)
    tl.store(product_grad_NV + place, grad.to(product_grad_NV.dtype.element_ty), mask=is_tile)


@triton.jit
def _logits(  # noqa: PLR0913 (a kernel has no records)
    hidden_ND, weight_VD, bias_V, row_N, column_V, num_rows, vocabulary, size, hidden_stride, weight_stride,
    inverse_temperature, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of logits and of d softcap(x) / dx. Rows and columns beyond the end have the logits of zeros."""
    value = tl.zeros((BLOCK_N, BLOCK_V), DTYPE)
    hidden_row = hidden_ND + row_N[:, None].to(tl.int64) * hidden_stride
    weight_row = weight_VD + column_V[None, :].to(tl.int64) * weight_stride
    for start in range(0, size, BLOCK_D):
        inner_D = start + tl.arange(0, BLOCK_D)
        is_inner = inner_D < size
        left = tl.load(hidden_row + inner_D[None, :], mask=(row_N < num_rows)[:, None] & is_inner[None, :], other=0.0)
        right = tl.load(weight_row + inner_D[:, None], mask=(column_V < vocabulary)[None, :] & is_inner[:, None], other=0.0)
        if UPCAST:  # The interpreter multiplies the bits of bfloat16 as integers.
            left, right = left.to(tl.float32), right.to(tl.float32)
        value = tl.dot(left, right, value, input_precision="ieee", out_dtype=DTYPE)
    if HAS_BIAS:
        value += tl.load(bias_V + column_V, mask=column_V < vocabulary, other=0.0)[None, :].to(DTYPE)
    slope = tl.full((1, 1), 1.0, DTYPE)
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(value / softcap))
        saturated = (1.0 - decay) / (1.0 + decay)
        value = softcap * tl.where(value < 0, -saturated, saturated)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    return value * inverse_temperature, slope
