"""Where the time of training steps went: a stacked bar for every few steps, and the shares of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup, escape

from mas_hpc.evaluation.report.plots import BOTTOM, HEIGHT, LEFT, NUM_COLOURS, RIGHT, TOP, WIDTH, ticks
from mas_hpc.evaluation.report.run_folder import MetricLine

KIND = "time"
WHOLE = f"{KIND}/step"
MAX_BARS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One phase; seconds a step.

    Example: StepTime(phase="train", parts=(("forward", 0.6), ("other", 0.4)), bars=((0, (0.5, 0.4)), (1, (0.7, 0.4))))
    """

    phase: str
    parts: tuple[tuple[str, float], ...]
    """Name and mean over all steps."""
    bars: tuple[tuple[int, tuple[float, ...]], ...]
    """First step of a few, and their means of all parts."""

    @property
    def total_s(self) -> float:
        """Mean of a step."""
        return sum(seconds for _, seconds in self.parts)


def step_times(lines: Sequence[MetricLine]) -> tuple[StepTime, ...]:
    """The phases whose steps were timed, in order."""
    timed = [line for line in lines if WHOLE in line.values]
    phases = dict.fromkeys(line.phase for line in timed)
    return tuple(_phase(phase, [line for line in timed if line.phase == phase]) for phase in phases)


def _phase(phase: str, lines: Sequence[MetricLine]) -> StepTime:
    keys = [key for key in dict.fromkeys(key for line in lines for key in line.values) if key.startswith(f"{KIND}/")]
    parts = sorted((key for key in keys if key != WHOLE), key=lambda key: key == f"{KIND}/other")
    size = -(-len(lines) // MAX_BARS)
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return StepTime(
        phase=phase,
        parts=tuple((key.removeprefix(f"{KIND}/"), _mean(lines, key)) for key in parts),
        bars=tuple((group[0].step, tuple(_mean(group, key) for key in parts)) for group in groups),
    )


def _mean(lines: Sequence[MetricLine], key: str) -> float:
    return fmean(line.values.get(key, 0.0) for line in lines)


def colour(part: int) -> str:
    """Style of a part by its place: the colours, then the same ones paler."""
    return f"c{part % NUM_COLOURS}{' pale' if part >= NUM_COLOURS else ''}"


def stacked(found: StepTime) -> Markup:
    """Bars of seconds from the first part, below, to the last."""
    scale = ticks(0.0, max(sum(seconds) for _, seconds in found.bars) or 1.0)
    room = (WIDTH - LEFT - RIGHT) / len(found.bars)

    def y(seconds: float) -> float:
        return HEIGHT - BOTTOM - seconds / scale[-1] * (HEIGHT - TOP - BOTTOM)

    drawn = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(found.phase)}: seconds a step</title>'
    ]
    for tick in scale:
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        drawn.append(f'<text class="tick end" x="{LEFT - 5}" y="{y(tick) + 3.5:.1f}">{tick:.4g}</text>')
    for place, (step, parts) in enumerate(found.bars):
        x, below = LEFT + place * room, 0.0
        for number, seconds in enumerate(parts):
            size = f'width="{0.84 * room:.1f}" height="{y(below) - y(below + seconds):.2f}"'
            drawn.append(f'<rect class="part {colour(number)}" x="{x:.1f}" y="{y(below + seconds):.2f}" {size}/>')
            below += seconds
        if place % -(-len(found.bars) // 6) == 0:
            drawn.append(f'<text class="tick mid" x="{x + 0.42 * room:.1f}" y="{HEIGHT - 6}">{step}</text>')
    return Markup("".join([*drawn, "</svg>"]))
