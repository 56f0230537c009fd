"""From losses of tokens to the loss of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.aggregate import aggregate, segment_mean, segment_sum

MODES = ["token_mean", "sequence_mean", "constant", "sequence_sum"]
SAMPLE = torch.tensor([0, 0, 1, 3, 3, 3, 4, 4, 4, 4])  # sample 2 has no trained token


def _value(loss_N: Tensor, mode: str, rows: Tensor | slice = slice(None)) -> Tensor:
    return aggregate(loss_N[rows], SAMPLE[rows], 5, mode=mode, num_tokens=10, num_samples=4, max_length=7)


def _plain(loss: list[float], mode: str) -> float:
    samples: dict[int, list[float]] = {}
    for value, sample in zip(loss, SAMPLE.tolist(), strict=True):
        samples.setdefault(sample, []).append(value)
    if mode == "token_mean":
        return sum(loss) / 10
    if mode == "sequence_mean":
        return sum(sum(values) / len(values) for values in samples.values()) / 4
    return sum(loss) / (4 * 7 if mode == "constant" else 4)


@pytest.mark.parametrize(
    ("mode", "loss"), [("sequence_mean", 0.0), ("token_mean", 0.5), ("constant", 0.2), ("sequence_sum", 2.0)]
)
def test_g6_the_four_modes(mode: str, loss: float) -> None:
    # ratio 1; advantage +1 over 2 tokens and -1 over 6
    loss_N = torch.tensor([-1.0] * 2 + [1.0] * 6, dtype=torch.float64)
    sample_N = torch.tensor([0] * 2 + [1] * 6)
    value = aggregate(loss_N, sample_N, 2, mode=mode, num_tokens=8, num_samples=2, max_length=10)
    assert value.item() == pytest.approx(loss, abs=1e-15)


def test_g1_the_token_mean_of_two_micro_batches_is_not_a_mean_of_means() -> None:
    parts = [torch.full((2,), 1.0), torch.full((6,), 3.0)]
    rows = [torch.zeros(2, dtype=torch.long), torch.zeros(6, dtype=torch.long)]
    total = sum(
        aggregate(loss, sample, 1, mode="token_mean", num_tokens=8, num_samples=2)
        for loss, sample in zip(parts, rows, strict=True)
    )
    assert total.item() == pytest.approx(2.5)


def test_g4_a_rank_divides_by_the_samples_of_all_ranks_once() -> None:
    # one sample a rank, of token means 1 and 3: 2, neither 4 (too big by the ranks) nor 1 (too small by them)
    shares = [
        aggregate(
            torch.full((length,), mean), torch.zeros(length, dtype=torch.long), 1,
            mode="sequence_mean", num_tokens=8, num_samples=2,
        ).item()
        for length, mean in ((2, 1.0), (6, 3.0))
    ]  # fmt: skip
    assert sum(shares) == pytest.approx(2.0)


@pytest.mark.parametrize("mode", MODES)
def test_g5_modes_agree_with_plain_sums_and_add_up_over_micro_batches(mode: str, check_additive) -> None:
    loss_N = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert _value(loss_N, mode).item() == pytest.approx(_plain(loss_N.tolist(), mode), rel=1e-13)
    assert torch.autograd.gradcheck(lambda x: _value(x, mode), loss_N)
    check_additive(lambda rows: _value(loss_N, mode, rows), [loss_N], SAMPLE)


def test_segments_without_a_token_are_zero_with_a_finite_gradient() -> None:
    value_N = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sample_N = torch.tensor([2, 0, 2])
    assert segment_sum(value_N, sample_N, 3).tolist() == [2.0, 0.0, 5.0]
    mean_S = segment_mean(value_N, sample_N, 3)
    assert mean_S.tolist() == [2.0, 0.0, 2.5]
    mean_S.sum().backward()
    assert value_N.grad.tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("mode", MODES)
def test_a_part_without_a_token_adds_nothing(mode: str) -> None:
    assert _value(torch.randn(10), mode, torch.empty(0, dtype=torch.long)).item() == 0.0
