"""What a credit run leaves behind: credited traces, a summary, training rows; and the tables of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mas_hpc.data import lines, trace_store
from mas_hpc.evaluation.metrics import clustered_mean, t_quantile
from mas_hpc.run import Run
from mas_hpc.types import Trace

if TYPE_CHECKING:
    from mas_hpc.phases.credit import CreditOptions, Selection

ROWS = ("pairs", "positives", "steps", "faults")
TITLES = {
    "removal": "re-run without them",
    "replacement": "replaced by the base policy",
    "masked": "masked replay",
    "resample": "resampled in context",
}
Records = Mapping[int, Mapping[str, Any]]


def summary(options: CreditOptions, selection: Selection, records: Records, requests: Mapping[str, int]) -> dict[str, Any]:
    """Plain data: what was counted, credit per message and Shapley value per agent with standard errors over questions."""
    found = [records[number] for number in sorted(records)]
    agents = list(dict.fromkeys(agent for entry in found for agent in (*entry["phi"], *entry["agents"])))
    failures = [entry["failure"] for entry in found if entry["failure"]]
    blamed = [entry["fault"]["agent"] for entry in found if entry["fault"]]
    return {
        "name": options.name,
        "method": options.method,
        "value": options.value if any(entry["phi"] for entry in found) else "",
        "replays": options.replays,
        "traces": {
            "file": selection.file.stem,
            "credited": len(found),
            "missing": len(selection.traces) - len(found),
            **selection.left_out,
        },
        "accuracy": fmean(entry["outcome"] for entry in found) if found else None,
        "requests": {name: requests.get(name, 0) for name in ("asked", "sampled", "known")},
        "agents": {agent: _agent(agent, found, blamed) for agent in agents},
        "failures": {
            "looked_at": len(failures),
            "without_a_first_error": len(failures) - len(blamed),
            "unparseable_replies": requests.get("unparseable", 0),
        },
        "unplaced": _mean([(entry["task"], entry["unplaced"]) for entry in found if entry["phi"]]),
        "rows": {name: len(_rows(found, name)) for name in (*ROWS, "unvalued")},
    }  # fmt: skip


def _agent(agent: str, found: Sequence[Mapping[str, Any]], blamed: Sequence[str]) -> dict[str, Any]:
    messages = [
        (entry["task"], reward) for entry in found for name, reward in zip(entry["agents"], entry["rewards"], strict=True)
        if name == agent and reward is not None
    ]  # fmt: skip
    phi = [(entry["task"], entry["phi"][agent]) for entry in found if agent in entry["phi"]]
    return {"message": _mean(messages), "phi": _mean(phi), "first_errors": Counter(blamed)[agent]}


def _mean(values: Iterable[tuple[str, float]]) -> dict[str, float | int | None]:
    """Mean, its standard error with questions as clusters, and the half width of the 95% interval by Student's t over them.

    None where there is nothing to tell them from.
    """
    clusters: dict[str, list[float]] = {}
    for task, value in values:
        clusters.setdefault(task, []).append(value)
    if not clusters:
        return {"mean": None, "standard_error": None, "half_width": None, "n": 0}
    found = clustered_mean(list(clusters.values()))
    error = found.standard_error
    half = None if error is None else t_quantile(found.num_clusters - 1) * error
    return {"mean": found.mean, "standard_error": error, "half_width": half, "n": found.n}


def _rows(found: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    if name == "steps":
        return [entry["steps"] for entry in found if entry["steps"]]
    if name == "faults":
        return [{"task": entry["task"], **entry["fault"]} for entry in found if entry["fault"]]
    return [row for entry in found for row in entry.get(name, ())]


def write(run: Run, options: CreditOptions, selection: Selection, records: Records, results: Mapping[str, Any]) -> None:
    """Replace credit/<name>/ (summary.json, a line a trace in traces.jsonl, rows for training) and traces/credit-<name>.jsonl.

    A kind of rows that this run has none of leaves no file.
    """
    folder = run.folder / "credit" / options.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    found = [records[number] for number in sorted(records)]
    bulky = {*ROWS, "unvalued"}
    plain = [{name: value for name, value in entry.items() if name not in bulky} for entry in found]
    _replace(folder / "traces.jsonl", [json.dumps(entry) for entry in plain])
    for name in ROWS:
        if rows := _rows(found, name):
            _replace(folder / f"{name}.jsonl", [json.dumps(row) for row in rows])
        else:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    credited = [_credited(selection.traces[number], entry, options.name) for number, entry in sorted(records.items())]
    _replace(run.folder / "traces" / f"credit-{options.name}.jsonl", [trace_store.to_json(trace) for trace in credited])


def _replace(file: Path, rows: Sequence[str]) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    lines.append(unfinished, rows, noun="credit")
    unfinished.rename(file)


def _credited(trace: Trace, entry: Mapping[str, Any], label: str) -> Trace:
    credit = dict(zip((turn.id for turn in trace.path), entry["rewards"], strict=True))
    turns = tuple(replace(turn, credit=credit.get(turn.id)) for turn in trace.turns)
    return replace(trace, turns=turns, label=f"credit {label}")


def print_credit(console: Console, results: Mapping[str, Any], folder: Path) -> None:
    """The credit of every agent, what was left out, and where the training rows are."""
    value = f", {TITLES[results['value']]}" if results["value"] else ""
    title = f"{results['method']}{value}: credit per agent, 95% intervals over questions"
    table = Table("agent", title=title, title_justify="left")
    attribution = "leave-one-out" if results["method"] == "loo" else "Shapley value"
    attributed = any(entry["phi"]["n"] for entry in results["agents"].values())
    for column in (*([attribution] if attributed else []), "per message", "messages", "first errors"):
        table.add_column(column, justify="right", no_wrap=True)
    for agent, entry in results["agents"].items():
        counts = (str(entry["message"]["n"]), str(entry["first_errors"]))
        phi = [_interval(entry["phi"])] if attributed else []
        table.add_row(agent, *phi, _interval(entry["message"]), *counts)
    console.print(table)
    console.print(_sentence(results), highlight=False, soft_wrap=True)
    rows = {name: number for name, number in results["rows"].items() if number and name in ROWS}
    for name, number in rows.items():
        console.print(f"{number} {name}: {folder / 'credit' / results['name'] / name}.jsonl", highlight=False, soft_wrap=True)
    if results["rows"]["unvalued"]:
        console.print(f"{results['rows']['unvalued']} alternatives could not be valued and make no pair", style="yellow")


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "-"
    half = f" +- {entry['half_width']:.3f}" if entry["half_width"] is not None else ""
    return f"{entry['mean']:+.3f}{half}"


def _sentence(results: Mapping[str, Any]) -> str:
    traces, requests = dict(results["traces"]), results["requests"]
    file, credited, missing = traces.pop("file"), traces.pop("credited"), traces.pop("missing")
    rest = "".join(f", {number} {reason}" for reason, number in traces.items())
    lost = f", {missing} with a value missing because every replay of it failed" if missing else ""
    parts = [f"{file}: {credited} traces credited{lost}{rest}."]
    if requests.get("asked"):
        sampled = f"{requests['sampled']} completions sampled for {requests['asked']} asked"
        parts.append(f"{sampled}; {requests['known']} outcomes known before.")
    elif requests.get("known"):
        parts.append(f"Nothing sampled: {requests['known']} outcomes were known before.")
    unplaced = results["unplaced"]["mean"]
    if unplaced:
        parts.append(f"On average {unplaced:+.3f} belongs to agents without a message on the path, which no message can carry.")
    if results["failures"]["looked_at"]:
        without, looked = results["failures"]["without_a_first_error"], results["failures"]["looked_at"]
        parts.append(f"{without} of {looked} failures show no first error: their blame is spread evenly.")
    if unparseable := results["failures"]["unparseable_replies"]:
        parts.append(f"{unparseable} replies of the judge could not be read: they name nobody.")
    return " ".join(parts)
