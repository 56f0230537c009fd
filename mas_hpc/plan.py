"""What the command line prints: the plan of a run, the reference of all knobs, the table of results. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mas_hpc.config import RecordConfig, RunConfig
from mas_hpc.config_file import knobs
from mas_hpc.config_methods import GroupConfig, OfflineConfig


def print_plan(config: RunConfig) -> None:
    """The phases of a run with their sizes, and every value that is not the default."""
    console = Console()
    table = Table(title=f"plan of {config.name!r} -> {config.folder}", title_justify="left")
    table.add_column("phase")
    table.add_column("what")
    for phase, what in plan(config):
        table.add_row(phase, what)
    console.print(table)
    changed = config.model_dump(mode="json", exclude_defaults=True)
    console.print("not default: " + (json.dumps(changed) if changed else "nothing"), soft_wrap=True, highlight=False)


def plan(config: RunConfig) -> list[tuple[str, str]]:
    """(phase, what it does) in order."""
    agents = " -> ".join(agent.name for agent in config.team.speaking)
    data = config.data
    noun = "records" if isinstance(data, RecordConfig) else "questions"
    rows = [
        ("model", f"{config.model.path}, {config.model.dtype}, policies {config.adapters.policies}"),
        ("data", f"{data.kind}: {data.num_train} training and {data.num_test} held-out {noun}"),
        ("team", f"{config.team.topology}: {agents}, {config.team.rounds} round(s), at most {config.team.max_speakers} turns"),
    ]
    if config.warm_start:
        rows.append(("warm start", f"SFT, {config.warm_start.steps} steps of {config.warm_start.batch_size} transcripts"))
    rows.append(("train", _training(config)))
    if config.untrainable:
        rows[-1] = ("train", f"refused: {config.untrainable}")
    temperatures = ", ".join(f"{temperature:g}" for temperature in config.evaluation.temperatures)
    num_test = min(config.evaluation.num_tasks, data.num_test)
    if noun == "records":
        return [*rows, ("held out", f"{num_test} records, before and after training")]
    beside = " beside equal-token controls" if config.evaluation.controls else ""
    rows.append(("evaluate", f"{num_test} held-out questions, temperatures {temperatures}{beside}"))
    return rows


def _training(config: RunConfig) -> str:
    """The method with the size of a step."""
    method = config.method
    name = f"{method.kind}, {method.steps} steps"
    if isinstance(method, OfflineConfig):
        return f"{name} of {method.batch_size} examples"
    times = method.group_size if isinstance(method, GroupConfig) else 1
    speakers = config.team.max_speakers if config.team.topology != "pipeline" else len(config.team.agents)
    calls = method.tasks_per_step * times * speakers
    updates = method.updates_per_batch * method.minibatches
    return (
        f"{name}; a step: {method.tasks_per_step} tasks x {times} x {speakers} agents = {calls} completions or more, "
        f"{updates} update(s)"
    )


def print_knobs() -> None:
    """Every knob with type, default and meaning."""
    console = Console(highlight=False)
    for key, kind, default, meaning in knobs():
        console.print(f"[bold]{escape(key)}[/bold]  {escape(kind)}, default {escape(default)}", soft_wrap=True)
        console.print(f"    {escape(meaning)}", soft_wrap=True)


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """Accuracy with its 95% interval and tokens of every row, verdict balance; then the gain and who wins."""
    from mas_hpc.evaluation.report.headline import sentences
    from mas_hpc.evaluation.report.run_folder import Results

    table = Table("system", title="held-out questions", title_justify="left")
    for column in ("T", "accuracy", "95% interval", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(
            row["name"], f"{row['temperature']:g}", f"{row['accuracy']:.1%}", f"{row['low']:.1%} - {row['high']:.1%}",
            f"{row['tokens_per_question']:.1f}", style="bold" if row["phase"] == "after" else "",
        )  # fmt: skip
    console.print(table)
    for row in (row for row in results["rows"] if row["repeated"]):
        found = dict(row["repeated"])
        k, error = f"{found.pop('k'):g}", found.pop("standard_error")
        shares = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
        noise = f" (standard error {100 * error:.1f} points)" if error is not None else ""
        console.print(f"{row['name']}, T={row['temperature']:g}, {k} episodes a question: {shares}{noise}", highlight=False)
    if any(row["verdicts"] for row in results["rows"]):
        console.print(_verdict_table(results))
    for sentence in sentences(Results.model_validate(results)):
        console.print(sentence, highlight=False)


def _verdict_table(results: Mapping[str, Any]) -> Table:
    columns = ("balanced_accuracy", "recall_right", "recall_wrong")
    table = Table("system", "T", "judge", title="verdicts on planted answers, every other one wrong", title_justify="left")
    for column in ("balanced", "right", "wrong", "unreadable"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results["rows"]:
        for agent, verdict in row["verdicts"].items():
            numbers = ("-" if verdict[name] is None else f"{verdict[name]:.3f}" for name in columns)
            table.add_row(row["name"], f"{row['temperature']:g}", agent, *numbers, str(verdict["unreadable"]))
    return table
