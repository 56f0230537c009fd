"""Products of a row's few queries with keys and values that it alone reads, compiled by Numba for one core.

A batched product of the BLAS spends time on starting each of many small ones; these loops wait for memory only, and do not
read what is hidden.
Legend: N rows times key/value heads, Q queries of a head, C columns, W of them in use, from `first` on, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from mas_hpc.rollout.native.kv_pool import KVShape

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

Loop = TypeVar("Loop", bound=Callable[..., None])


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
    """Whether these loops are for keys and values `like` that; where torch has several threads, its products use them."""
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and torch.get_num_threads() == 1


@compiled
def scores(query_NQD: Floats, key_NCD: Floats, start_N: Ints, first: int, scaling: np.floating, score_NQW: Floats) -> None:
    """Write the products with the keys; -inf in columns before `start_N`."""
    for n in range(query_NQD.shape[0]):
        start = start_N[n] - first
        for q in range(query_NQD.shape[1]):
            for w in range(start):
                score_NQW[n, q, w] = -np.inf
        for w in range(start, score_NQW.shape[2]):
            for q in range(query_NQD.shape[1]):
                total = np.float32(0) * scaling  # float32, unless all are float64
                for d in range(query_NQD.shape[2]):
                    total += query_NQD[n, q, d] * key_NCD[n, first + w, d]
                score_NQW[n, q, w] = total * scaling


@compiled
def weigh(weight_NQW: Floats, value_NCD: Floats, start_N: Ints, first: int, sum_NQD: Floats) -> None:
    """Write the weighted sums of the values from `start_N` on."""
    for n in range(weight_NQW.shape[0]):
        for q in range(weight_NQW.shape[1]):
            for d in range(value_NCD.shape[2]):
                sum_NQD[n, q, d] = 0
        for w in range(start_N[n] - first, weight_NQW.shape[2]):
            for q in range(weight_NQW.shape[1]):
                weight = weight_NQW[n, q, w]
                for d in range(value_NCD.shape[2]):
                    sum_NQD[n, q, d] += weight * value_NCD[n, first + w, d]
