"""Which traces mas-hpc credit reads, and how they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mas_hpc.data import trace_store
from mas_hpc.phases.credit import CreditOptions, credit
from tests.phases.conftest import NUM_TASKS, opened
from tests.phases.scripted_team import HONEST, record, spoken_for


def test_parts_of_several_ranks_are_one_file(folder: Path) -> None:
    traces = record(folder, HONEST)
    (folder / "traces" / "rollout.jsonl").unlink()
    trace_store.write(folder / "traces" / "rollout.rank0.jsonl", traces[::2])
    trace_store.write(folder / "traces" / "rollout.rank1.jsonl", traces[1::2])
    run, _ = spoken_for(opened(folder), HONEST)
    for name in ("", "rollout"):
        assert credit(run, CreditOptions(method="outcome", traces=name))["traces"]["credited"] == NUM_TASKS


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("rollout", "after-T1", "train"), "rollout"),
        (("before-T1", "after-T0", "after-T1", "train"), "after-T1"),
        (("evaluate-T0", "evaluate-T0.7"), "evaluate-T0.7"),
        (("rollout", "credit-local"), "rollout"),
    ],
)
def test_the_file_is_the_one_that_most_likely_is_meant(folder: Path, present: Sequence[str], chosen: str) -> None:
    traces = record(folder, HONEST)
    (folder / "traces" / "rollout.jsonl").unlink()
    for name in present:
        trace_store.write(folder / "traces" / f"{name}.jsonl", traces)
    assert credit(opened(folder), CreditOptions(method="outcome"))["traces"]["file"] == chosen


def test_replays_have_the_temperature_of_the_file(folder: Path) -> None:
    traces = record(folder, HONEST)
    for name, temperature in (("evaluate-T0", 0.0), ("evaluate-T0.7", 0.7), ("rollout", 1.0)):
        (folder / "traces" / f"{name}.jsonl").unlink(missing_ok=True)
        trace_store.write(folder / "traces" / f"{name}.jsonl", traces)
        run, engine = spoken_for(opened(folder), HONEST)
        credit(run, CreditOptions(method="loo", replays=1, traces=name))
        assert {request.sampling.temperature for request in engine.requests} == {temperature}


def test_a_limit_takes_the_first_traces(folder: Path) -> None:
    traces = record(folder, HONEST)
    credit(opened(folder), CreditOptions(method="outcome", limit=3))
    found = list(trace_store.read(folder / "traces" / "credit-outcome.jsonl"))
    assert [trace.task.id for trace in found] == [trace.task.id for trace in traces[:3]]
