"""Compiled products against the formula in float64, by hand, and where nothing can be kept on disk."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mas_hpc.rollout.native import row_products
from mas_hpc.rollout.native.kv_pool import KVShape

N, Q, C, D, FIRST, STOP = 4, 3, 21, 5, 2, 19
START_N = np.array([2, 2, 7, 18])
ZERO_N = np.zeros(N, dtype=np.int64)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float64, 1e-15)])
def test_products_with_keys_and_with_values_are_those_of_the_formula(dtype: type[np.floating], bound: float) -> None:
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal(size).astype(dtype) for size in ((N, Q, D), (N, D, C), (N, C, D)))
    key[3, :, :18] = value[3, :18] = np.nan  # hidden: not read
    score, total = np.full((N, Q, STOP - FIRST), 9, dtype), np.full((N, Q, D), 9, dtype)
    row_products.multiply(query, key, 0, FIRST, ZERO_N, START_N, score)
    weight = np.exp(score)
    row_products.multiply(weight, value, FIRST, 0, START_N, ZERO_N, total)
    for n, start in enumerate(START_N):
        expected = query[n].astype(np.float64) @ key[n, :, start:STOP].astype(np.float64)
        np.testing.assert_allclose(score[n, :, start - FIRST :], expected, rtol=0, atol=10 * bound)
        assert (score[n, :, : start - FIRST] == -np.inf).all()
        np.testing.assert_allclose(total[n], np.exp(expected) @ value[n, start:STOP], rtol=100 * bound, atol=100 * bound)


def test_infinities_and_nan_are_what_they_are() -> None:
    matrix, product = np.array([[[np.inf, np.nan, 2.0]]]), np.zeros((1, 1, 3))
    row_products.multiply(np.array([[[1.0]]]), matrix, 0, 0, ZERO_N, ZERO_N, product)
    np.testing.assert_equal(product[0, 0], [np.inf, np.nan, 2.0])


def test_they_are_for_one_thread_of_an_amd_processor_and_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def suited(dtype: torch.dtype, device: str = "cpu") -> bool:
        return row_products.is_suited(KVShape(layers=1, heads=1, dim=1, dtype=dtype, device=torch.device(device)))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(row_products, "host_cpu", lambda: "znver3")
    assert suited(torch.float32) and not suited(torch.bfloat16) and not suited(torch.float32, "meta")
    monkeypatch.setattr(row_products, "host_cpu", lambda: "emeraldrapids")
    assert not suited(torch.float32)
    monkeypatch.setattr(row_products, "host_cpu", lambda: "znver3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not suited(torch.float32)


def test_without_a_folder_to_keep_them_in_they_are_compiled_all_the_same() -> None:
    code = "from mas_hpc.rollout.native import row_products; print(type(row_products.multiply._cache).__name__)"
    for classes, kept in (("InTreeCacheLocator", "FunctionCache"), ("UserProvidedCacheLocator", "NullCache")):
        environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": classes, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == kept, done.stderr
