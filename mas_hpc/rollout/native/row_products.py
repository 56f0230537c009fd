"""Products of a row's few queries with keys and values that it alone reads, compiled by Numba for one core.

For processors on which the BLAS multiplies three rows by a matrix slowly; it may, too, read what is hidden.
Legend: N rows times key/value heads, Q queries of a head, I inner dimension, O columns of the product,
R rows and C columns of the matrix that it is made with, of which it takes a part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from llvmlite.binding import get_host_cpu_name
from numba import njit

from mas_hpc.rollout.native.kv_pool import KVShape

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

Loop = TypeVar("Loop", bound=Callable[..., None])

host_cpu = cache(get_host_cpu_name)
"""LLVM's name of the processor."""


def compiled(loop: Loop) -> Loop:
    """By Numba at the first call, and kept for the next process where Numba finds a folder that can be written.

    Sums are made in any order, so that they are vectors; infinities and nan are what they are.
    """
    vectors = {"reassoc", "contract", "nsz"}
    try:
        return cast(Loop, njit(loop, error_model="numpy", fastmath=vectors, cache=True))
    except RuntimeError:  # no such folder: seconds at the first step of each process
        return cast(Loop, njit(loop, error_model="numpy", fastmath=vectors))


def is_suited(like: KVShape) -> bool:
    """Whether to multiply keys and values `like` that here, and not by torch: on one thread of an AMD processor."""
    is_cpu = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
    return is_cpu and torch.get_num_threads() == 1 and host_cpu().startswith("znver")


@compiled
def _multiply_one(
    left_QI: Floats, right_RC: Floats, first_row: int, first_column: int, start: int, hidden: int, product_QO: Floats
) -> None:  # fmt: skip
    product_QO[:, :hidden] = -np.inf
    product_QO[:, hidden:] = 0
    columns = slice(first_column + hidden, first_column + product_QO.shape[1])
    whole = start + (left_QI.shape[1] - start) // 4 * 4
    for i in range(start, whole, 4):  # four rows at a time: the product is read and written a fourth as often
        row = first_row + i
        w, x, y, z = right_RC[row, columns], right_RC[row + 1, columns], right_RC[row + 2, columns], right_RC[row + 3, columns]
        for q in range(left_QI.shape[0]):
            a, b, c, d = left_QI[q, i], left_QI[q, i + 1], left_QI[q, i + 2], left_QI[q, i + 3]
            product_O = product_QO[q, hidden:]
            for o in range(len(product_O)):
                product_O[o] += a * w[o] + b * x[o] + c * y[o] + d * z[o]
    for i in range(whole, left_QI.shape[1]):
        w = right_RC[first_row + i, columns]
        for q in range(left_QI.shape[0]):
            product_O = product_QO[q, hidden:]
            for o in range(len(product_O)):
                product_O[o] += left_QI[q, i] * w[o]


@compiled
def multiply(
    left_NQI: Floats, right_NRC: Floats, first_row: int, first_column: int, start_row_N: Ints, start_column_N: Ints,
    product_NQO: Floats,
) -> None:  # fmt: skip
    """Write left @ right[first_row :, first_column :], as wide as `product_NQO`.

    Of each right matrix only rows from `start_row_N` and columns from `start_column_N` on are read, which are not before the
    first; -inf in the columns before.
    """
    for n in range(left_NQI.shape[0]):
        start, hidden = start_row_N[n] - first_row, start_column_N[n] - first_column
        _multiply_one(left_NQI[n], right_NRC[n], first_row, first_column, start, hidden, product_NQO[n])
