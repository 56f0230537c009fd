"""What every loss must hold: the shares of micro-batches add up to the loss and the gradients of the batch (G1, G2, G5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""Rows of the batch -> their share of its loss."""
CheckAdditive = Callable[[Loss, Sequence[Tensor], Tensor], None]


@pytest.fixture
def check_additive() -> CheckAdditive:
    """check(loss, leaves, part_of_row): rows that have the same `part_of_row` stay together in 1, 2 and 4 micro-batches."""

    def check(loss: Loss, leaves: Sequence[Tensor], part_of_row: Tensor) -> None:
        results = []
        for parts in (1, 2, 4):
            for leaf in leaves:
                leaf.grad = None
            total = 0.0
            for part in range(parts):
                share = loss((part_of_row % parts == part).nonzero().flatten())
                share.backward()
                total += share.item()
            results.append((total, [leaf.grad.clone() for leaf in leaves]))
        for total, gradients in results[1:]:
            assert total == pytest.approx(results[0][0], rel=1e-12)
            torch.testing.assert_close(gradients, results[0][1], rtol=1e-12, atol=1e-14)
        assert all(gradient.abs().sum() > 0 for gradient in results[0][1])

    return check
