"""mas-hpc scale: a configuration, a site and lengths become a table, a plot or JSON. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, pstdev

from rich.console import Console

from mas_hpc.config import RunConfig
from mas_hpc.errors import DataError
from mas_hpc.launch.site import load_site
from mas_hpc.scaling import fit, plot, report
from mas_hpc.scaling.calibration import read_calibration
from mas_hpc.scaling.load import Lengths
from mas_hpc.scaling.machine import machine_of
from mas_hpc.scaling.published import points, read_published
from mas_hpc.scaling.shape import named_shape, shape_of
from mas_hpc.scaling.step import Question, predict

SIGMA = 0.8
"""Of the logarithm of lengths where none are given: the 99th of 100 is 4.7 times the mean."""
MOST_OBSERVED = 100_000


def show_predictions(  # noqa: PLR0913 (what the command line takes)
    config: RunConfig, site: str, nodes: str, lengths: Lengths, *, calibration: Path | None, shape: str, weak: bool,
    as_json: bool, plot_file: Path | None,
) -> None:  # fmt: skip
    """Print what a step takes on these numbers of nodes. Raises ConfigError for what cannot be asked."""
    place = load_site(site)
    numbers = report.parse_nodes(nodes, place.num_nodes)
    if plot_file:
        plot.check_plot(plot_file)
    question = Question(
        config=config, shape=named_shape(shape) if shape else shape_of(config.model), lengths=lengths,
        machine=machine_of(place, read_calibration(calibration) if calibration else None),
        weak_from=numbers[0] if weak else 0,
    )  # fmt: skip
    predictions = [predict(question, number) for number in numbers]
    if as_json:
        print(json.dumps(report.as_record(question, predictions), indent=1))
    else:
        report.print_predictions(Console(), question, predictions)
    if plot_file:
        plot.save_plot(plot_file, f"{config.name}: {config.method.kind} on {place.name}", predictions)


def show_points() -> None:
    """Print the published points beside what the shipped parameters say of them, and how sure these are."""
    published = read_published()
    known = list(points(published))
    values = fit.shipped()
    report.print_points(Console(), fit.judge(known, values), values, fit.bootstrap(known, values), published)


def lengths_of(config: RunConfig, traces: Path | None, question: float, completion: float) -> Lengths:
    """From a run's traces, else as given; half the limit where nothing is. Raises DataError for traces without turns."""
    limit = config.rollout.max_new_tokens
    if traces is None:
        return Lengths(
            question=question, completion=completion or limit / 2, sigma=SIGMA, limit=limit,
            source=f"supposed (give --traces, or --question-tokens and --completion-tokens), lognormal with sigma {SIGMA}",
        )  # fmt: skip
    from mas_hpc.data.trace_store import read

    observed: list[int] = []
    first: list[int] = []
    for trace in read(traces):
        turns = [turn for turn in trace.turns if turn.finish != "error"]
        observed += [len(turn.completion_ids) for turn in turns]
        first += [len(turn.prompt_ids) for turn in turns if turn.index == 0]
        if len(observed) >= MOST_OBSERVED:
            break
    if not observed or not first:
        raise DataError(f"{traces}: no turn that has a completion; expected the traces of a rollout or training run")
    logs = [math.log(max(1, length)) for length in observed]
    return Lengths(
        question=fmean(first), completion=max(1.0, fmean(observed)), sigma=pstdev(logs), limit=max(limit, *observed),
        observed=tuple(observed), source=f"{len(observed)} turns of {traces}",
    )  # fmt: skip
