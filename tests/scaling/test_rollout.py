import numpy as np
import pytest

from mas_hpc.distributed import shared_tickets
from mas_hpc.scaling import rollout
from mas_hpc.scaling.load import Lengths
from mas_hpc.scaling.rollout import Roofline, play, sample_jobs


def test_the_queue_by_hand() -> None:
    # Two ranks, room for one, a second a step: 5 and 3 first, then the one that is free after 3 takes 4: ends at 7 and 5.
    ends, rows = play(np.array([5.0, 3.0, 4.0]), 2, 1, lambda live: 1.0)
    assert sorted(ends) == [5.0, 7.0]
    assert rows == 1.0


def test_a_step_costs_more_with_more_rows() -> None:
    # One rank, room for both: two rows until the shorter ends, at 2 s a step, then one.
    ends, _ = play(np.array([3.0, 5.0]), 1, 2, lambda live: float(live))
    assert ends[0] == 3 * 2.0 + 2 * 1.0


def test_no_work_is_lost_or_done_twice() -> None:
    jobs = np.random.default_rng(0).lognormal(3, 1, 500)
    ends, _ = play(jobs, 7, 1, lambda live: 1.0)
    assert ends.max() >= jobs.sum() / 7
    assert ends.sum() == pytest.approx(jobs.sum())  # with room for one, a rank is busy for its jobs' steps, one after another


def test_dynamic_tickets_are_shared_out_as_the_real_ones_are() -> None:
    assert rollout.SUPPLY == shared_tickets.SUPPLY


def test_the_longest_sibling_and_all_turns_count() -> None:
    lengths = Lengths(question=1, completion=1, sigma=0.0, limit=9, observed=(7,), source="here")
    assert sample_jobs(lengths, 2, 3, 4, np.random.default_rng(0)).tolist() == [21.0, 21.0]
    free = Lengths(question=1, completion=100, sigma=0.8, limit=10_000, source="here")
    drawn = sample_jobs(free, 20_000, 1, 1, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(100, rel=0.03)
    assert np.percentile(drawn, 99) / 100 == pytest.approx(4.67, rel=0.06)


def test_the_roofline_turns_from_memory_to_products() -> None:
    line = Roofline(weight_bytes=10.0, kv_bytes=1.0, flops=4.0, bytes_per_s=1.0, flops_per_s=1.0)
    assert line.step_s(1) == 11.0
    assert line.step_s(10) == 40.0
