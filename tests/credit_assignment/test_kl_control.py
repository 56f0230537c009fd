"""The adaptive KL coefficient."""

from __future__ import annotations

import pytest

from mas_hpc.credit_assignment.kl_control import KLController

ADAPTIVE = KLController(coefficient=0.2, target=6.0, horizon=10_000)


def test_g18_a_kl_of_twice_the_target_raises_the_coefficient() -> None:
    assert ADAPTIVE.updated(12.0, 256).coefficient == pytest.approx(0.201024, abs=1e-12)


def test_the_error_is_clipped_on_both_sides_and_proportional_between() -> None:
    assert ADAPTIVE.updated(0.0, 256).coefficient == pytest.approx(0.198976, abs=1e-12)
    assert ADAPTIVE.updated(6.6, 256).coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.0256), abs=1e-12)
    assert ADAPTIVE.updated(6.0, 256).coefficient == 0.2


def test_without_a_target_the_coefficient_is_fixed() -> None:
    fixed = KLController(coefficient=0.05, target=None, horizon=10_000)
    assert fixed.updated(100.0, 256) is fixed


def test_state_is_never_changed_in_place() -> None:
    ADAPTIVE.updated(12.0, 256)
    assert ADAPTIVE.coefficient == 0.2


def test_a_batch_that_could_turn_the_coefficient_negative_is_refused() -> None:
    with pytest.raises(AssertionError, match="negative"):
        ADAPTIVE.updated(0.0, 50_000)
