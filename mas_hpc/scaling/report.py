"""What is printed: predictions for numbers of nodes, the points that the model was fitted on and tried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from mas_hpc.errors import ConfigError
from mas_hpc.scaling.fit import GROUPS, Outcome, Values, median_error
from mas_hpc.scaling.memory import RESERVED
from mas_hpc.scaling.published import Published
from mas_hpc.scaling.step import ADVICE, Prediction, Question, efficiency, memory_advice

MAX_ROWS = 100


def parse_nodes(text: str, most: int) -> tuple[int, ...]:
    """1..10000 is 1, 2, 4, ... 8192, 10000; 4,8,12 are these. Raises ConfigError naming what was expected."""
    first, dots, last = text.partition("..")
    parts = [part.strip() for part in ((first, last) if dots else text.split(","))]
    if not all(part.isdecimal() and int(part) for part in parts) or (dots and int(first) > int(last)):
        raise ConfigError(f"--nodes {text}: expected numbers such as 256, 4,8,16 or 1..10000")
    numbers = [int(part) for part in parts]
    if dots:
        low, high = numbers
        numbers = [low << power for power in range(high.bit_length()) if low << power < high] + [high]
    if max(numbers) > most:
        raise ConfigError(f"--nodes {text}: the site has {most} nodes; ask for fewer, or name another --site")
    if len(numbers) > MAX_ROWS:
        raise ConfigError(f"--nodes {text}: {len(numbers)} numbers; expected at most {MAX_ROWS}")
    return tuple(sorted(set(numbers)))


def print_predictions(console: Console, question: Question, predictions: Sequence[Prediction]) -> None:
    """A row a number of nodes, then what limits and what to change."""
    config, lengths, machine = question.config, question.lengths, question.machine
    growth = f"batch grows with nodes from {question.weak_from}" if question.weak_from else "the batch as it is"
    console.print(f"{config.method.kind}, {question.shape.parameters / 1e9:.4g} billion weights, {growth}", highlight=False)
    console.print(
        f"rates: {machine.source}; lengths: {lengths.source}, completions {lengths.completion:.0f} tokens in the mean, at most "
        f"{lengths.limit}, after questions of {lengths.question:.0f}", highlight=False,
    )  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("nodes", "seconds", "9 of 10\nwithin", "effi-\nciency", "GiB\na tile", "longest part", "node-h\na step",
                   "node-h\nin all", "lost"):  # fmt: skip
        table.add_column(column, justify="left" if column == "longest part" else "right", no_wrap=True)
    for one in predictions:
        memory = _short(one.memory.tile / 2**30) + ("" if one.fits else " NO")
        table.add_row(
            str(one.nodes), _short(one.seconds), f"{_short(one.low)} - {_short(one.high)}",
            f"{efficiency(predictions, one):.0%}", memory, _share(one), _short(one.node_hours),
            _short(one.node_hours * config.method.steps), f"{one.keeping.lost:.0%}", style="" if one.fits else "red",
        )  # fmt: skip
    console.print(table)
    for line in advice(question, predictions):
        console.print(line, highlight=False)


def _short(number: float) -> str:
    """Three digits, and no exponent of large ones."""
    return f"{number:.3g}" if number < 1000 else f"{float(f'{number:.3g}'):,.0f}"


def _share(one: Prediction) -> str:
    if one.limit == "no_units":
        return f"idle {one.idle:.0%}"
    return f"{one.limit} {one.parts[one.limit] / one.seconds:.0%}"


def advice(question: Question, predictions: Sequence[Prediction]) -> list[str]:
    """What limits, from which number of nodes on, and what to change; what does not fit; what was not counted."""
    lines, said = [], ""
    for one in predictions:
        if one.limit != said:
            lines.append(f"from {one.nodes} nodes: {ADVICE[one.limit]}")
            said = one.limit
    too_large = [one for one in predictions if not one.fits]
    if too_large:
        limit = (1 - RESERVED) * question.machine.memory_bytes / 2**30
        lines.append(f"NO: more than the {limit:.3g} GiB that a tile gives; {memory_advice(too_large[0])}")
    last = predictions[-1].keeping
    lines.append(
        f"on {predictions[-1].nodes} nodes: a fault every {1 / last.failures_per_hour:.3g} h; a checkpoint takes "
        f"{last.write_seconds:.3g} s, best after every {last.interval_seconds / 60:.3g} min of work; a job starts in "
        f"{question.machine.start_seconds(predictions[-1].nodes):.3g} s"
    )
    return lines + list(predictions[-1].load.notes)


def as_record(question: Question, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The same for programs: seconds, bytes, node-hours."""
    rows = [
        {
            "nodes": one.nodes, "ranks": one.ranks, "seconds": one.seconds, "low": one.low, "high": one.high,
            "efficiency": efficiency(predictions, one), "parts": one.parts, "limit": one.limit, "idle": one.idle,
            "memory_bytes": asdict(one.memory) | {"tile": one.memory.tile}, "fits": one.fits,
            "node_hours_step": one.node_hours, "node_hours_run": one.node_hours * question.config.method.steps,
            "keeping": asdict(one.keeping),
        }
        for one in predictions
    ]  # fmt: skip
    return {
        "method": question.config.method.kind, "shape": asdict(question.shape), "lengths": asdict(question.lengths),
        "rates": question.machine.source, "weak_from": question.weak_from, "rows": rows,
        "advice": advice(question, predictions),
    }  # fmt: skip


def print_points(
    console: Console, outcomes: Sequence[Outcome], values: Values, ranges: Mapping[str, tuple[float, float]],
    published: Published,
) -> None:  # fmt: skip
    """Every published point with its prediction, the parameters with their ranges, and medians."""
    table = Table(title="published points", title_justify="left")
    for column in ("series", "case", "source", "measured s", "predicted s", "error", ""):
        table.add_column(column, justify="right" if column in ("measured s", "predicted s", "error") else "left")
    for one in outcomes:
        point = one.point
        table.add_row(
            point.series, point.case, point.source, f"{point.measured:.4g}", f"{one.predicted:.4g}", f"{one.error:+.1%}",
            "fitted" if point.fitted else "held back",
        )  # fmt: skip
    console.print(table)
    parameters = Table("parameter", "value", "9 of 10 bootstrapped fits", title="parameters", title_justify="left")
    for name, (low, high) in ranges.items():
        ends = (
            f"{low:.3g}" if low > values[name] / 100 else "any less",
            f"{high:.3g}" if high < 100 * values[name] else "any more",
        )
        parameters.add_row(name, f"{values[name]:.4g}", " - ".join(ends))
    console.print(parameters)
    for group in GROUPS:
        held = [abs(one.error) for one in outcomes if one.point.group == group and not one.point.fitted]
        console.print(f"{group}: median error {median(held):.1%} on {len(held)} points held back", highlight=False)
    number = sum(not one.point.fitted for one in outcomes)
    console.print(
        f"all: median error {median_error(outcomes, fitted=False):.1%} on {number} points held back, "
        f"{median_error(outcomes, fitted=True):.1%} on {len(outcomes) - number} fitted by {len(ranges)} parameters",
        highlight=False,
    )
    for left_out in published.not_modelled:
        console.print(f"not modelled: {left_out.what}: {left_out.why}", highlight=False)
