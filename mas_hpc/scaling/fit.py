"""Few parameters, fitted on half of the published points and tried on the other half."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import numpy as np
from numpy.typing import NDArray

from mas_hpc.launch.site import Site, load_site
from mas_hpc.scaling.machine import FITTED_FILE, corrected, read_fitted
from mas_hpc.scaling.published import Point, points, read_published

SITE = "aurora"
START = {
    "gemm_share": 0.6, "gemm_share_deepspeed": 0.6, "score_passes": 10.0, "hop_us": 20.0, "gb_per_s": 13.0,
    "gather_gb_per_s": 13.0,
    "stage_base_s": 60.0, "stage_node_s": 0.2, "initialize_base_s": 10.0, "initialize_node_s": 6.0, "write_gb_per_s": 10.0,
}  # fmt: skip
"""The parameters, and where the fit begins. gemm_share: of the GEMM rate, that passes reach under torch; score_passes: times
that attention without a fused kernel reads or writes its scores; hop_us, gb_per_s: of links beyond a node; gather_gb_per_s: of
rings beyond a card, which gather and scatter; write_gb_per_s: of one checkpoint."""
GROUPS = {
    "step": ("gemm_share", "gemm_share_deepspeed", "score_passes", "hop_us", "gb_per_s", "gather_gb_per_s"),
    "stage": ("stage_base_s", "stage_node_s"), "initialize": ("initialize_base_s", "initialize_node_s"),
    "checkpoint": ("write_gb_per_s",),
}  # fmt: skip
Values = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A point with what the fit says of it, in seconds.

    Example: Outcome(point=point, predicted=2.3).error == 0.03
    """

    point: Point
    predicted: float

    @property
    def error(self) -> float:
        """Relative, with its sign."""
        return self.predicted / self.point.measured - 1


def fit(known: Sequence[Point]) -> Values:
    """Least squares of log(predicted / measured) over the fitted points, group by group."""
    values = dict(START)
    for group, names in GROUPS.items():
        chosen = [point for point in known if point.fitted and point.group == group]
        values |= _fit_group(chosen, names, values)
    spread = math.sqrt(sum(math.log1p(one.error) ** 2 for one in _fitted_steps(known, values)) / _freedom(known))
    return values | {"spread": spread}


def judge(known: Sequence[Point], values: Values) -> list[Outcome]:
    """Every point with its prediction."""
    return [Outcome(point=point, predicted=seconds) for point, seconds in zip(known, _predict(known, values), strict=True)]


def median_error(outcomes: Sequence[Outcome], *, fitted: bool) -> float:
    """Median of the sizes of relative errors."""
    return median(abs(one.error) for one in outcomes if one.point.fitted is fitted)


def bootstrap(known: Sequence[Point], values: Values, repeats: int = 30, seed: int = 0) -> dict[str, tuple[float, float]]:
    """5th and 95th percentile of each parameter, over fits of points drawn with replacement, within their groups."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(repeats):
        again = dict(values)
        for group, names in GROUPS.items():
            chosen = [point for point in known if point.fitted and point.group == group]
            picked = [chosen[place] for place in random.integers(0, len(chosen), len(chosen))]
            again |= _fit_group(picked, names, again, starts=(0.0,))
        drawn.append(again)
    ends = {name: np.percentile([again[name] for again in drawn], (5, 95)) for name in START}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def shipped() -> Values:
    """The parameters that predictions use."""
    return read_fitted()[SITE]


def refit() -> Values:
    """Fit, and write the parameters where predictions find them."""
    values = {name: float(f"{value:.5g}") for name, value in fit(list(points(read_published()))).items()}
    FITTED_FILE.write_text(json.dumps({SITE: values}, indent=2) + "\n", encoding="utf-8")
    return values


def _predict(chosen: Sequence[Point], values: Values) -> list[float]:
    complete = {"spread": 0.0, **values}
    machine = corrected(_site(), complete)
    return [point.predict(complete, machine) for point in chosen]


@cache
def _site() -> Site:
    return load_site(SITE)


def _fit_group(
    chosen: Sequence[Point], names: Sequence[str], start: Values, starts: Sequence[float] = (-0.5, 0.0, 0.5)
) -> Values:  # fmt: skip
    """`starts`: how far from there the logarithms begin; of several fits the lowest counts."""

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = start | {name: float(math.exp(log)) for name, log in zip(names, logs, strict=True)}
        measured = [point.measured for point in chosen]
        return np.log(np.array(_predict(chosen, values)) / measured)

    begin = np.array([math.log(start[name]) for name in names])
    tried = [least_squares(residuals, begin + shift) for shift in starts]
    found = min(tried, key=lambda place: float((residuals(place) ** 2).sum()))
    return {name: float(math.exp(log)) for name, log in zip(names, found, strict=True)}


def _fitted_steps(known: Sequence[Point], values: Values) -> list[Outcome]:
    return [one for one in judge(known, values) if one.point.fitted and one.point.group == "step"]


def _freedom(known: Sequence[Point]) -> int:
    return sum(point.fitted and point.group == "step" for point in known) - len(GROUPS["step"])


def least_squares(
    residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]], start: NDArray[np.float64], rounds: int = 100
) -> NDArray[np.float64]:  # fmt: skip
    """Levenberg and Marquardt's method with differences for derivatives; few parameters, all of size about 1."""
    place, damping = start, 1e-2
    here = residuals(place)
    for _ in range(rounds):
        slopes = np.stack([(residuals(place + step) - here) / 1e-6 for step in 1e-6 * np.eye(len(place))], axis=1)
        square = slopes.T @ slopes
        move = np.linalg.solve(square + damping * (np.diag(np.diag(square)) + 1e-9 * np.eye(len(place))), -slopes.T @ here)
        there = residuals(place + np.clip(move, -1, 1))
        if there @ there < here @ here:
            gained = here @ here - there @ there
            place, here, damping = place + np.clip(move, -1, 1), there, damping / 3
            if gained < 1e-8 * (here @ here) + 1e-18:
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return place
