"""What sampling cost, in the report: a table over phases, and charts of training steps by unit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mas_hpc.evaluation.report.build import build_report
from mas_hpc.evaluation.report.plots import panels
from mas_hpc.evaluation.report.run_folder import MetricLine, read_run
from mas_hpc.evaluation.report.sampling import sampled
from tests.evaluation.test_report import HOSTILE, Page

COST = {
    "rollout/requests": 8, "rollout/prompt_tokens": 4000, "rollout/prefilled_tokens": 1000, "rollout/shared_tokens": 3000,
    "rollout/evicted_tokens": 7, "rollout/decoded_tokens": 1500, "rollout/wall_s": 2.0, "rollout/peak_kv_bytes": 3 << 20,
    "rollout/occupancy": 0.5, "rollout/padding_fraction": 0.125, "rollout/tokens_per_s": 750.0, "latency/solver": 0.5,
    "latency_p95/solver": 2.25, f"latency/{HOSTILE[:-1]}": 0.125, f"latency_p95/{HOSTILE[:-1]}": 0.25,
}  # fmt: skip


def line(phase: str, step: int, **changes: float) -> MetricLine:
    return MetricLine(phase=phase, step=step, values=COST | {f"rollout/{name}": value for name, value in changes.items()})


def write(folder: Path, *lines: MetricLine) -> Path:
    folder.mkdir(exist_ok=True)
    records = [{"phase": one.phase, "step": one.step, **one.values} for one in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_steps_add_up_but_for_shares_peaks_and_latencies() -> None:
    first = line("train", 0)
    second = line("train", 1, prompt_tokens=6000, shared_tokens=1000, decoded_tokens=500, occupancy=1.0, peak_kv_bytes=1 << 20)
    second.values["latency_p95/solver"] = 0.75
    rows = sampled([line("rollout", 0), first, MetricLine(phase="train", step=2, values={"loss": 1.0}), second])
    assert [row.phase for row in rows] == ["rollout", "train"]
    both = rows[1]
    assert (both.requests, both.prompt_tokens, both.decoded_tokens, both.evicted_tokens) == (16, 10_000, 2000, 14)
    assert (both.shared, both.tokens_per_s, both.occupancy, both.peak_mib) == (0.4, 500.0, 0.75, 3.0)
    assert both.agents[0] == ("solver", 0.5, 1.5)


def test_shares_of_nothing_are_left_empty(tmp_path: Path) -> None:
    values = {"rollout/requests": 0.0, "rollout/prompt_tokens": 0.0}
    [row] = sampled([MetricLine(phase="rollout", step=0, values=values)])
    assert (row.shared, row.tokens_per_s, row.occupancy, row.wasted, row.agents) == (None, None, None, None, ())
    assert "rollout" in build_report(write(tmp_path, MetricLine(phase="rollout", step=0, values=values))).read_text()


def test_the_table_shows_each_phase_and_a_phase_of_costs_alone_has_no_charts(tmp_path: Path) -> None:
    html = build_report(write(tmp_path, line("rollout", 0), line("train", 0))).read_text(encoding="utf-8")
    page = Page(html)
    text = " ".join(" ".join(page.text).split())
    for shown in ("rollout 8 4,000 75.0% 7 1,500 750 50.0% 12.5% 3.0 MiB", "solver 0.50 (2.25 s)"):
        assert shown in text
    assert not [tag for tag, _ in page.tags if tag in ("img", "figure")]


def test_training_steps_chart_the_cost_by_unit_and_leave_agents_their_colours() -> None:
    values = {"reward/solver": 0.5, "reward/critic": 0.25, "seconds/total": 2.0} | {
        name: value for name, value in COST.items() if HOSTILE[:-1] not in name
    }
    found = {panel.title: panel for panel in panels([MetricLine(phase="train", step=0, values=values)])}
    names = {title: [series.name for series in panel.series] for title, panel in found.items()}
    assert names["Tokens of rollout"] == ["prefilled_tokens", "shared_tokens", "evicted_tokens", "decoded_tokens"]
    assert names["Rollout batch"] == ["occupancy", "padding_fraction"] and found["Rollout batch"].share
    assert names["Decoded tokens a second"] == ["tokens_per_s"]
    assert not {"Rollout", "rollout"} & names.keys()
    colour = {series.colour for panel in found.values() for series in panel.series if series.name == "solver"}
    assert colour == {0}


def test_a_step_that_was_taken_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    write(tmp_path, line("train", 0), line("train", 1), line("train", 0, requests=3), line("train", 1, requests=4))
    metrics = read_run(tmp_path, 1).metrics
    assert [one.values["rollout/requests"] for one in metrics] == [3, 4]
    assert sampled(metrics)[0].requests == pytest.approx(7)
