"""Charts as inline SVG: they need no script, take the page's colours and weigh a few kilobytes each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup, escape

from mas_hpc.evaluation.report.run_folder import MetricLine, Row

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 8, 8, 22
NUM_COLOURS = 6
SMOOTH_FROM = 40
"""Curves with at least this many points also get a running mean over a tenth of them."""
TITLES = {
    "loss": "Loss",
    "reward": "Reward",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced verdict accuracy",
    "degenerate": "Degenerate groups (all rewards equal)",
    "rewards": "Rewards of preferences",
    "f1": "First-error F1 (ProcessBench)",
    "kl": "KL to the reference (nats)",
    "clip_ratio": "Share of clipped ratios",
    "value": "Critic",
    "sampling": "Trainer against engine",
    "completions": "Completion length (tokens)",
    "entropy": "Entropy (nats per token)",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens": "Tokens",
    "tokens_per_s": "Trained tokens a second",
    "mfu": "Model FLOP use",
    "memory": "Memory at its highest (MiB)",
    "latency": "Mean latency of a request (s)",
    "latency_p95": "95th percentile of the latency (s)",
    "sampled_tokens": "Tokens of rollout",
    "batch": "Rollout batch",
    "speed": "Decoded tokens a second",
    "seconds": "Seconds",
}
"""In the order of the page; other metrics follow under their own names."""
SHARES = ("accuracy", "balanced_accuracy", "degenerate", "batch")
OF_ROLLOUT = {
    "prefilled_tokens": "sampled_tokens",
    "shared_tokens": "sampled_tokens",
    "decoded_tokens": "sampled_tokens",
    "evicted_tokens": "sampled_tokens",
    "occupancy": "batch",
    "padding_fraction": "batch",
    "idle_fraction": "batch",
    "busy_fraction": "batch",
    "tokens_per_s": "speed",
}
"""Charts of metrics rollout/<name>, which have several units; others are left to the table."""
PARTS = ("seconds", "sampled_tokens", "batch", "speed", "memory")
"""Charts whose lines are parts of something, not agents: they have colours of their own."""
Points = tuple[tuple[int, float], ...]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart; points are (step, value), NaN and infinities included."""

    name: str
    colour: int
    points: Points


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart.

    Example: Panel(title="Reward", series=(Series(name="solver", colour=0, points=((0, 0.5), (1, 0.75))),), share=False)
    """

    title: str
    series: tuple[Series, ...]
    share: bool
    """Values are shares: the axis runs from 0 to 1."""

    @property
    def num_missing(self) -> int:
        """Values that are not finite and so cannot be drawn."""
        return sum(not math.isfinite(value) for series in self.series for _, value in series.points)


def panels(lines: Sequence[MetricLine]) -> tuple[Panel, ...]:
    """Charts of one phase: metrics `<kind>/<name>` with one kind share a chart, and a name keeps its colour."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for key, value in line.values.items():
            kind, _, name = key.partition("/")
            if kind == "time":  # drawn by step_time
                continue
            if kind == "rollout":
                if name not in OF_ROLLOUT:
                    continue
                kind = OF_ROLLOUT[name]
            points.setdefault(kind, {}).setdefault(name, []).append((line.step, value))
    kinds = [kind for kind in TITLES if kind in points] + sorted(set(points) - set(TITLES))
    agents = list(dict.fromkeys(name for kind in kinds if kind not in PARTS for name in points[kind] if name))
    return tuple(
        Panel(
            title=TITLES.get(kind, kind),
            share=kind in SHARES,
            series=tuple(
                Series(name=name, colour=_index(list(points[kind]) if kind in PARTS else agents, name), points=tuple(values))
                for name, values in points[kind].items()
            ),
        )
        for kind in kinds
    )


def draw(panel: Panel) -> Markup:
    """The chart of a panel."""
    finite = [point for series in panel.series for point in series.points if math.isfinite(point[1])]
    first, last = _range([step for step, _ in finite] or [0, 1])
    ticks_y = ticks(*((0.0, 1.0) if panel.share else _range([value for _, value in finite] or [0.0, 1.0])))
    low, high = ticks_y[0], ticks_y[-1]

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(panel.title)}</title>']
    for tick in ticks_y:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 5}" y="{y(tick) + 3.5:.1f}">{tick:.4g}</text>')
    for tick in ticks(first, last):
        if first <= tick <= last and tick == int(tick):
            parts.append(f'<text class="tick mid" x="{x(tick):.1f}" y="{HEIGHT - 6}">{tick:.0f}</text>')
    for series in panel.series:
        smooth = len(series.points) >= SMOOTH_FROM
        parts += [_line(run, x, y, f"c{series.colour}{' raw' if smooth else ''}") for run in _runs(series.points)]
        if smooth:
            parts += [_line(running_mean(run), x, y, f"c{series.colour}") for run in _runs(series.points)]
    return Markup("".join(parts) + "</svg>")


def interval(row: Row) -> Markup:
    """Accuracy as a dot with its interval, on an axis from 0 to 1."""
    low, high = row.low if row.low is not None else row.accuracy, row.high if row.high is not None else row.accuracy
    x = [f"{4 + 152 * min(max(value, 0.0), 1.0):.1f}" for value in (low, row.accuracy, high)]
    phase = escape(row.phase)
    return Markup(
        f'<svg class="interval" viewBox="0 0 160 16" aria-hidden="true"><path class="axis" d="M4 8H156"/>'
        f'<line class="whisker {phase}" x1="{x[0]}" x2="{x[2]}" y1="8" y2="8"/>'
        f'<circle class="{phase}" cx="{x[1]}" cy="8" r="4.5"/></svg>'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A named value with the half width of its interval.

    Example: Bar(name="solver", value=0.31, half=0.04)
    """

    name: str
    value: float
    half: float
    """0 where there is none."""


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars from zero, each with its interval; negative ones point to the left."""
    ends = [end for row in rows for end in (row.value - row.half, row.value + row.half, 0.0)]
    ticks_x = ticks(*_range(ends))
    left, height = 92, TOP + 26 * len(rows) + BOTTOM

    def x(value: float) -> float:
        return left + (value - ticks_x[0]) / (ticks_x[-1] - ticks_x[0]) * (WIDTH - RIGHT - left)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}</title>']
    for tick in ticks_x:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick mid" x="{x(tick):.1f}" y="{height - 6}">{tick:.4g}</text>')
    for place, row in enumerate(rows):
        y, low, high = TOP + 26 * place + 13, min(row.value, 0.0), max(row.value, 0.0)
        style = "good" if row.value >= 0 else "bad"
        parts.append(f'<text class="tick end" x="{left - 8}" y="{y + 3.5}">{escape(row.name[:14])}</text>')
        size = f'width="{x(high) - x(low):.1f}" height="14"'
        parts.append(f'<rect class="bar {style}" x="{x(low):.1f}" y="{y - 7}" {size}/>')
        if row.half:
            between = f'x1="{x(row.value - row.half):.1f}" x2="{x(row.value + row.half):.1f}"'
            parts.append(f'<line class="whisker" {between} y1="{y}" y2="{y}"/>')
    return Markup("".join([*parts, "</svg>"]))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 4 to 7 of them, that enclose the range."""
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(size * magnitude for size in (1, 2, 2.5, 5, 10) if size * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def running_mean(points: Points) -> Points:
    """Centred mean over a tenth of the points, narrower at the ends."""
    half = max(2, len(points) // 20)
    values = [value for _, value in points]
    windows = (min(half, index, len(points) - 1 - index) for index in range(len(points)))
    return tuple((points[i][0], fmean(values[i - w : i + w + 1])) for i, w in enumerate(windows))


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) % NUM_COLOURS if name else 0


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest value, widened when equal."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * abs(high) else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _runs(points: Points) -> Iterable[Points]:
    """Stretches of finite values: a line is interrupted where a value cannot be drawn."""
    run: list[tuple[int, float]] = []
    for point in points:
        if math.isfinite(point[1]):
            run.append(point)
        elif run:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


def _line(points: Points, x: Scale, y: Scale, style: str) -> str:
    if len(points) == 1:
        return f'<circle class="line {style}" cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="1.5"/>'
    return f'<polyline class="line {style}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'
