import math

import pytest

from mas_hpc.scaling.failures import daly_interval, wall_over_work


def test_the_interval_is_where_the_wall_time_is_least() -> None:
    write, between, restart = 60.0, 7200.0, 120.0
    best = min(range(60, 7200), key=lambda seconds: wall_over_work(seconds, write, restart, between))
    assert daly_interval(write, between) == pytest.approx(best, rel=0.01)
    young = math.sqrt(2 * write * between)
    assert abs(daly_interval(write, between) - best) < abs(young - best)


def test_checkpoints_that_take_longer_than_faults_are_apart() -> None:
    assert daly_interval(500.0, 100.0) == 100.0


def test_a_machine_that_never_fails_pays_for_writing_alone() -> None:
    assert wall_over_work(1000.0, 10.0, 60.0, 1e12) == pytest.approx(1.01)
    assert wall_over_work(1e6, 10.0, 60.0, 1.0) == math.inf
