"""What sampling costs, in numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from mas_hpc.phases.accounting import Account, latencies_of, percentile, print_account, stats_to_json, summed
from mas_hpc.rollout.engine import RolloutStats
from mas_hpc.types import Trace

STATS = RolloutStats(
    requests=4, prompt_tokens=100, prefilled_tokens=30, evicted_tokens=5, decoded_tokens=60, steps=10, row_steps=40,
    idle_row_steps=4, padded_keys=100, real_keys=300, peak_kv_bytes=1 << 20, wall_s=1.5, cpu_s=1.0,
)  # fmt: skip
ACCOUNT = Account(stats=STATS, wall_s=2.0, num_ranks=1, max_rows=8, latencies={"solver": (0.2, 0.6), "critic": (1.0,)})


def test_metrics_are_counts_shares_and_latencies() -> None:
    assert ACCOUNT.metrics() == pytest.approx(
        {
            "rollout/requests": 4, "rollout/prompt_tokens": 100, "rollout/prefilled_tokens": 30, "rollout/shared_tokens": 70,
            "rollout/decoded_tokens": 60, "rollout/evicted_tokens": 5, "rollout/peak_kv_bytes": 1 << 20, "rollout/wall_s": 2.0,
            "rollout/padding_fraction": 0.25, "rollout/occupancy": 0.5, "rollout/idle_fraction": 0.1,
            "rollout/busy_fraction": 0.75, "rollout/tokens_per_s": 30.0, "latency/solver": 0.4, "latency/critic": 1.0,
            "latency_p95/solver": 0.6, "latency_p95/critic": 1.0,
        }
    )  # fmt: skip


def test_shares_of_nothing_are_left_out() -> None:
    found = replace(ACCOUNT, stats=RolloutStats(requests=4), latencies={}).metrics()
    assert found.keys() & {"rollout/occupancy", "rollout/padding_fraction", "rollout/idle_fraction"} == set()
    assert found["rollout/busy_fraction"] == 0.0


def test_ranks_add_up_but_for_the_fullest_memory() -> None:
    total = summed([stats_to_json(STATS), stats_to_json(replace(STATS, requests=6, peak_kv_bytes=3 << 20))])
    assert total == replace(STATS + STATS, requests=10, peak_kv_bytes=3 << 20)


def test_one_phase_after_the_other_takes_the_time_of_both() -> None:
    later = replace(ACCOUNT, stats=replace(STATS, peak_kv_bytes=5), latencies={"critic": (3.0,), "judge": (4.0,)})
    both = ACCOUNT.then(later)
    assert both.stats == replace(STATS + STATS, peak_kv_bytes=1 << 20) and both.wall_s == 4.0
    assert both.latencies == {"solver": (0.2, 0.6), "critic": (1.0, 3.0), "judge": (4.0,)}


def test_the_95th_percentile_is_a_value_that_was_measured() -> None:
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile(range(1, 21), 0.95) == 19
    assert percentile((7.0,), 0.95) == 7.0


def test_latencies_are_of_every_answered_turn(traces: list[Trace]) -> None:
    first, *rest = [replace(turn, wall_s=float(place)) for place, turn in enumerate(traces[0].turns)]
    found = latencies_of([replace(traces[0], turns=(replace(first, finish="error"), *rest))] * 2)
    assert found == {turn.agent: (float(place),) * 2 for place, turn in enumerate(traces[0].turns) if place}


def test_the_table_says_what_was_shared_and_who_was_slow(capsys) -> None:
    print_account(Console(width=100), ACCOUNT)
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("100: 30 prefilled, 70 shared, 5 evicted", "60: 30 a second", "50% full", "25% padding", "1.0 MiB"):
        assert words in shown
    assert "latency of solver" in shown and "0.40 s, p95 0.60 s" in shown
    print_account(Console(quiet=True), replace(ACCOUNT, stats=RolloutStats(), wall_s=0.0))
