"""Weights between the trainer's policy and the engine's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.mismatch import mismatch_weight

RATIO, GAP = "sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/mean"
NAN = math.nan


def _weight(difference: list[float], level: str, action: str, cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    old = torch.full((len(difference),), -1.0, dtype=torch.float64, requires_grad=True)
    behavior = old.detach() - torch.tensor(difference, dtype=torch.float64)
    sample = torch.zeros(len(difference), dtype=torch.long)
    return mismatch_weight(old, behavior, sample, 1, level=level, action=action, cap=cap)


@pytest.mark.parametrize(
    ("level", "action", "cap", "expected"),
    [
        ("token", "truncate", 2.0, [1.105171, 2.0, 0.606531]),
        ("token", "mask", 2.0, [1.105171, 0.0, 0.606531]),
        ("sequence", "mask", 3.0, [0.0, 0.0, 0.0]),  # exp(1.1) = 3.004
        ("sequence", "truncate", 3.0, [3.0, 3.0, 3.0]),
        ("sequence", "mask", 3.01, [3.004166] * 3),
    ],
)
def test_g32_weights(level: str, action: str, cap: float, expected: list[float]) -> None:
    weight, metrics = _weight([0.1, 1.5, -0.5], level, action, cap)
    assert weight.tolist() == pytest.approx(expected, abs=5e-7)
    assert not weight.requires_grad and metrics[RATIO] is weight
    assert metrics[GAP].tolist() == pytest.approx([0.1, 1.5, 0.5])


def test_g32_a_token_without_an_engine_logprob_has_weight_one_and_no_distance() -> None:
    weight, metrics = _weight([NAN, 0.5, NAN], "token", "truncate", 2.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(0.5), 1.0])
    assert metrics[GAP].tolist() == pytest.approx([0.5])
    weight, metrics = _weight([NAN, NAN], "sequence", "mask", 2.0)
    assert weight.tolist() == [1.0, 1.0] and metrics[GAP].numel() == 0


def test_sequences_are_weighed_apart_and_a_sample_without_tokens_is_no_trouble() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    behavior, sample = torch.tensor([-0.1, 0.3, -0.2, 0.3], dtype=torch.float64), torch.tensor([0, 2, 0, 2])
    weight, _ = mismatch_weight(old, behavior, sample, 3, level="sequence", action="truncate", cap=9.0)
    assert weight.tolist() == pytest.approx([math.exp(s) for s in (0.3, -0.6, 0.3, -0.6)])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("action", ["truncate", "mask"])
@pytest.mark.parametrize("parts", [2, 4])
def test_random_weights_agree_with_plain_loops_whole_and_in_micro_batches(level: str, action: str, parts: int) -> None:
    generator = torch.Generator().manual_seed(3)
    old, behavior = (torch.randn(20, generator=generator, dtype=torch.float64) * 0.7 for _ in range(2))
    behavior[4] = NAN
    sample = torch.randint(0, 6, (20,), generator=generator)
    gaps = [0.0 if math.isnan(b) else o - b for o, b in zip(old.tolist(), behavior.tolist(), strict=True)]
    sums = {s: math.fsum(g for g, t in zip(gaps, sample.tolist(), strict=True) if t == s) for s in range(6)}
    logs = gaps if level == "token" else [sums[s] for s in sample.tolist()]
    expected = [min(math.exp(x), 1.5) if action == "truncate" else math.exp(x) * (math.exp(x) <= 1.5) for x in logs]
    assert 0 < sum(math.exp(x) > 1.5 for x in logs) < 20
    for part in [torch.arange(20)] + [(sample % parts == p).nonzero().flatten() for p in range(parts)]:
        weight, _ = mismatch_weight(old[part], behavior[part], sample[part], 6, level=level, action=action, cap=1.5)
        assert weight.tolist() == pytest.approx([expected[i] for i in part.tolist()], rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("action", ["truncate", "mask"])
def test_g17_extreme_differences_give_weights_within_the_cap(level: str, action: str) -> None:
    for difference in (1e4, -1e4, math.inf, -math.inf):
        weight, _ = _weight([difference, 0.0], level, action, 2.0)
        assert weight.isfinite().all() and (weight >= 0).all() and (weight <= 2).all()
