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


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float64, 1e-15)])
def test_scores_and_sums_are_those_of_the_formula(dtype: type[np.floating], bound: float) -> None:
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal(size).astype(dtype) for size in ((N, Q, D), (N, C, D), (N, C, D)))
    key[3, :18] = value[3, :18] = np.nan  # hidden: not read
    score, total = np.full((N, Q, STOP - FIRST), 9, dtype), np.full((N, Q, D), 9, dtype)
    row_products.scores(query, key, START_N, FIRST, dtype(0.5), score)
    weight = np.exp(score)
    row_products.weigh(weight, value, START_N, FIRST, total)
    for n, start in enumerate(START_N):
        columns = slice(start, STOP)
        expected = query[n].astype(np.float64) @ key[n, columns].T.astype(np.float64) * 0.5
        np.testing.assert_allclose(score[n, :, start - FIRST :], expected, rtol=0, atol=10 * bound)
        assert (score[n, :, : start - FIRST] == -np.inf).all()
        np.testing.assert_allclose(total[n], np.exp(expected) @ value[n, columns], rtol=0, atol=300 * bound)


def test_infinities_and_nan_are_what_they_are() -> None:
    key, score = np.array([[[np.inf], [np.nan], [2.0]]]), np.zeros((1, 1, 3))
    row_products.scores(np.array([[[1.0]]]), key, np.array([0]), 0, np.float64(1), score)
    np.testing.assert_equal(score[0, 0], [np.inf, np.nan, 2.0])


def test_they_are_for_one_thread_of_a_cpu_and_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def suited(dtype: torch.dtype, device: str = "cpu") -> bool:
        return row_products.is_suited(KVShape(layers=1, heads=1, dim=1, dtype=dtype, device=torch.device(device)))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert suited(torch.float32) and not suited(torch.bfloat16) and not suited(torch.float32, "meta")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not suited(torch.float32)


def test_without_a_folder_to_keep_them_in_they_are_compiled_all_the_same() -> None:
    code = "from mas_hpc.rollout.native import row_products; print(type(row_products.scores._cache).__name__)"
    for classes, kept in (("InTreeCacheLocator", "FunctionCache"), ("UserProvidedCacheLocator", "NullCache")):
        environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": classes, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == kept, done.stderr
