"""The bars of a step's time: what is drawn is what was measured."""

from __future__ import annotations

import re

import pytest

from mas_hpc.evaluation.report.plots import BOTTOM, HEIGHT, TOP, panels
from mas_hpc.evaluation.report.run_folder import MetricLine
from mas_hpc.evaluation.report.step_time import MAX_BARS, StepTime, colour, stacked, step_times


def line(phase: str, step: int, **seconds: float) -> MetricLine:
    values = {f"time/{name}": value for name, value in seconds.items()}
    return MetricLine(phase=phase, step=step, values={**values, "time/step": sum(seconds.values()), "loss": 1.0})


def test_a_phase_has_the_means_of_its_parts_and_other_comes_last() -> None:
    lines = [
        line("train", 0, other=1.0, forward=2.0),
        line("train", 1, forward=4.0, rollout=6.0),
        line("warm_start", 0, other=1.0),
    ]
    lines.append(MetricLine(phase="train/held_out", step=1, values={"loss": 1.0}))
    train, warm_start = step_times(lines)
    assert train == StepTime(
        phase="train",
        parts=(("forward", 3.0), ("rollout", 3.0), ("other", 0.5)),
        bars=((0, (2.0, 0.0, 1.0)), (1, (4.0, 6.0, 0.0))),
    )
    assert train.total_s == 6.5 and warm_start.parts == (("other", 1.0),)


def test_many_steps_share_bars() -> None:
    [found] = step_times([line("train", step, forward=float(step)) for step in range(100)])
    assert len(found.bars) <= MAX_BARS
    assert found.bars[1] == (4, (5.5,)), "the mean of steps 4 to 7"


def test_bars_are_as_high_as_their_seconds_and_stand_on_each_other() -> None:
    found = StepTime(phase="train", parts=(("forward", 2.0), ("other", 2.0)), bars=((7, (3.0, 1.0)),))
    rectangles = [
        (style, float(y), float(height))
        for style, y, height in re.findall(
            r'<rect class="part (c\d)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', stacked(found)
        )
    ]
    (first, y_first, high_first), (second, y_second, high_second) = rectangles
    assert (first, second) == ("c0", "c1") and high_first == pytest.approx(3 * high_second)
    assert y_first + high_first == pytest.approx(HEIGHT - BOTTOM) and y_second + high_second == pytest.approx(y_first, abs=0.02)
    assert y_second == pytest.approx(TOP), "4 seconds are the top of the axis"
    assert ">7</text>" in stacked(found)


def test_there_are_styles_for_all_parts() -> None:
    assert colour(0) == "c0" and colour(7) == "c1 pale"


def test_the_time_is_in_no_other_chart() -> None:
    assert [panel.title for panel in panels([line("train", 0, forward=1.0)])] == ["Loss"]
