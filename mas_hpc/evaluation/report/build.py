"""The report of a run: one HTML file that needs no network and treats model text as text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mas_hpc.errors import DataError
from mas_hpc.evaluation.report import headline, plots
from mas_hpc.evaluation.report.run_folder import CreditSummary, RunFolder, TraceFile, read_run
from mas_hpc.evaluation.report.sampling import is_cost_alone, sampled
from mas_hpc.evaluation.report.step_time import colour, stacked, step_times
from mas_hpc.types import Trace, Turn

TRACES_PER_FILE = 40
TRACE_BUDGET_BYTES = 3_000_000
"""Of embedded traces, all files together; a file with longer traces shows fewer of them."""
PHASES = {"warm_start": "Warm start", "train": "Training", "train/held_out": "Held-out data"}
_HERE = Path(__file__).parent


def build_report(folder: Path) -> Path:
    """Write report.html into a run folder, from whatever of its files exist, and return its path.

    Raises DataError when the folder holds none of a run's files, or one that cannot be read or written.
    """
    run = read_run(folder, TRACES_PER_FILE)
    target = folder / "report.html"
    try:
        target.write_text(render(run), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}; expected a writable folder and space") from None
    return target


def render(run: RunFolder) -> str:
    """The page of a run."""
    budget = TRACE_BUDGET_BYTES // max(1, len(run.trace_files))
    shown = {file.name: _within(file, budget) for file in run.trace_files}
    charts = _charts(run)
    data = {
        "charts": [[_series(series) for series in panel.series] for _, group in charts for panel in group],
        "traces": [record for records in shown.values() for record in records],
    }
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    script = (_HERE / "viewer.js").read_text(encoding="ascii")
    return environment.get_template("template.html.j2").render(
        run=run,
        rows=headline.compare(run.results.rows),
        sentences=headline.sentences(run.results) or headline.held_out(run.metrics),
        charts=charts,
        sampled=sampled(run.metrics),
        step_times=step_times(run.metrics),
        stacked=stacked,
        colour=colour,
        phase_title=lambda phase: PHASES.get(phase, phase),
        credit=[_credit(summary) for summary in run.credit],
        shown=[(file.name, len(shown[file.name]), file.total) for file in run.trace_files],
        data=_json_for_script(data),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((_HERE / "style.css").read_text(encoding="ascii")),
        draw=plots.draw,
        interval=plots.interval,
        setting=headline.setting,
        p_text=headline.p_text,
    )


def _credit(summary: CreditSummary) -> tuple[str, CreditSummary, list[tuple[str, Markup]]]:
    """The name of a credit run, its numbers, and a chart of its agents and of their messages."""
    figures = {
        "Credit per agent": [(agent, entry.phi) for agent, entry in summary.agents.items()],
        "Credit per message": [(agent, entry.message) for agent, entry in summary.agents.items()],
    }
    charts = []
    for title, entries in figures.items():
        rows = [
            plots.Bar(name=agent, value=found.mean, half=found.half_width or 0.0)
            for agent, found in entries
            if found.mean is not None
        ]
        if rows:
            charts.append((title, plots.bars(title, rows)))
    return summary.name, summary, charts


def _charts(run: RunFolder) -> list[tuple[str, tuple[plots.Panel, ...]]]:
    phases = dict.fromkeys([*PHASES, *(line.phase for line in run.metrics)])
    lines = [line for line in run.metrics if not is_cost_alone(line)]
    groups = ((phase, plots.panels([line for line in lines if line.phase == phase])) for phase in phases)
    return [(PHASES.get(phase, phase), group) for phase, group in groups if group]


def _series(series: plots.Series) -> dict[str, Any]:
    return {"name": series.name, "points": [(step, _number(value)) for step, value in series.points]}


def _within(file: TraceFile, budget_bytes: int) -> list[dict[str, Any]]:
    """The traces for the viewer, thinned evenly until they fit."""
    records = [_trace(trace, file.name) for trace in file.traces]
    while records and sum(len(json.dumps(record)) for record in records) > budget_bytes:
        records = records[: len(records) // 2 * 2 : 2]
    return records


def _trace(trace: Trace, file: str) -> dict[str, Any]:
    return {
        "set": f"{file}: {trace.label}" if trace.label and trace.label != file else file,
        "step": trace.step,
        "task": trace.task.id,
        "question": trace.task.question,
        "compact": trace.task.compact,
        "expected": trace.task.answer,
        "answer": trace.answer,
        "reward": _number(trace.reward),
        "turns": [_turn(turn) for turn in trace.turns],
    }


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "id": turn.id,
        "parent": turn.parent,
        "agent": turn.agent,
        "policy": turn.policy,
        "version": turn.policy_version,
        "index": turn.index,
        "sibling": turn.sibling,
        "committed": turn.committed,
        "counterfactual": turn.counterfactual,
        "text": turn.text,
        "answer": turn.answer,
        "verdict": turn.verdict,
        "finish": turn.finish,
        "error": turn.error,
        "seed": str(turn.seed),  # script numbers hold 53 bits
        "promptTokens": len(turn.prompt_ids),
        "tokens": len(turn.completion_ids),
        "logprob": _number(math.fsum(turn.behavior_logprobs)),
        "reward": _number(turn.reward),
        "local": _number(turn.local_reward),
        "team": _number(turn.team_reward),
        "credit": _number(turn.credit),
    }


def _number(value: float | None) -> float | None:
    """Five digits are enough to look at; what JSON cannot hold becomes null."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _json_for_script(data: object) -> Markup:
    """JSON that cannot end the script element around it, whatever text it holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
