"""Step time and efficiency over nodes as one SVG, with the band; no library, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from mas_hpc.errors import ConfigError
from mas_hpc.scaling.step import Prediction, efficiency

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 64, 34, 44
SUFFIXES = (".svg", ".html")
STYLE = "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.time{fill:none;stroke:#1565c0;stroke-width:2}" \
    ".band{fill:#1565c0;opacity:.15}.share{fill:none;stroke:#c62828;stroke-width:2;stroke-dasharray:6 3}"  # fmt: skip
Scale = Callable[[float], float]


def check_plot(file: Path) -> None:
    """Raises ConfigError for a kind of file that is not drawn."""
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {file}: expected a name that ends in {' or '.join(SUFFIXES)} (any browser prints it as PNG)")


def save_plot(file: Path, title: str, predictions: Sequence[Prediction]) -> None:
    """Write the chart; an .html file is a page with nothing else on it."""
    check_plot(file)
    svg = draw(title, predictions)
    page = f"<!doctype html><html><head><meta charset='utf-8'><title>{_escape(title)}</title></head><body>{svg}</body></html>"
    file.write_text(page if file.suffix == ".html" else svg, encoding="utf-8")


def draw(title: str, predictions: Sequence[Prediction]) -> str:
    """Both axes of time are logarithmic; efficiency, on the right, is not."""
    nodes = [one.nodes for one in predictions]
    x = _logarithmic(nodes[0], max(nodes[-1], 2 * nodes[0]), LEFT, WIDTH - RIGHT)
    lowest, highest = min(one.low for one in predictions), max(one.high for one in predictions)
    y = _logarithmic(lowest, highest, HEIGHT - BOTTOM, TOP)
    shares = [efficiency(predictions, one) for one in predictions]
    top = max(1.0, *shares)

    def right(share: float) -> float:
        return HEIGHT - BOTTOM - share / top * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>',
        f'<title>{_escape(title)}</title><text x="{LEFT}" y="18">{_escape(title)}</text>',
        *_grid(nodes, lowest, highest, x, y),
    ]
    band = [(one.nodes, one.low) for one in predictions] + [(one.nodes, one.high) for one in reversed(predictions)]
    parts.append(f'<polygon class="band" points="{_path(band, x, y)}"/>')
    parts.append(f'<polyline class="time" points="{_path([(one.nodes, one.seconds) for one in predictions], x, y)}"/>')
    parts.append(f'<polyline class="share" points="{_path(list(zip(nodes, shares, strict=True)), x, right)}"/>')
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{right(share) + 4:.1f}" style="fill:#c62828">{share:.0%}</text>')
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 8}">nodes; blue: seconds a step, nine of ten within the band; red: efficiency</text>'
    )
    return "".join(parts) + "</svg>"


def _grid(nodes: Sequence[int], lowest: float, highest: float, x: Scale, y: Scale) -> list[str]:
    parts = []
    for number in nodes:
        parts.append(f'<text text-anchor="middle" x="{x(number):.1f}" y="{HEIGHT - BOTTOM + 16}">{_short(number)}</text>')
    for exponent in range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1):
        for digit in (1, 2, 5):
            if lowest <= (tick := digit * 10.0**exponent) <= highest:
                parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
                parts.append(f'<text text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{tick:g} s</text>')
    return parts


def _logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    span = math.log(high / low)
    return lambda value: start + math.log(value / low) / span * (end - start)


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(first):.1f},{y(second):.1f}" for first, second in points)


def _short(number: int) -> str:
    return str(number) if number < 1000 else f"{number / 1000:.3g}k"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
