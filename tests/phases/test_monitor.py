"""Looks at held-out data, and the best weights among them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World
from mas_hpc.phases.monitor import Monitor
from mas_hpc.run import Run, build

CONFIG = Path(__file__).parents[2] / "configs" / "sft.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    overrides = ["model.hidden_size=16", "data.num_train=4", "data.num_test=2", f"runs_dir={tmp_path}"]
    built = build(load_config(CONFIG, overrides), World(), Console(quiet=True))
    return replace(built, console=Console(file=io.StringIO(), width=120))


class Counter:
    """One weight, as a learner would hold it."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight

    def weights(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach().clone()}

    @torch.no_grad()
    def put_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weight.copy_(weights["weight"])


def train(run: Run, values: list[float], *, eval_every: int, best: str = "-loss") -> tuple[float, list[int]]:
    """A weight that counts the steps; `values` is the held-out metric after each of them, first before any."""
    weight, looked = torch.nn.Parameter(torch.zeros(1)), []

    def held_out() -> dict[str, float]:
        looked.append(int(weight.item()))
        return {best.removeprefix("-"): values[looked[-1]]}

    steps = len(values) - 1
    with Monitor(
        run, "train", steps, title="t", weights=Counter(weight), held_out=held_out, eval_every=eval_every, best=best
    ) as monitor:
        for step in range(steps):
            with torch.no_grad():
                weight += 1
            monitor.log(step, {"loss": float(step)})
            monitor.look(step)
    return weight.item(), looked


def shown(run: Run) -> str:
    return run.console.file.getvalue()


def test_without_eval_every_the_last_weights_are_kept_and_compared_with_the_first(run: Run) -> None:
    assert train(run, [5.0, 1.0, 3.0, 4.0], eval_every=0) == (3.0, [0, 3])
    assert "after 3 steps" in shown(run) and "5.0000" in shown(run) and "4.0000" in shown(run)


def test_the_best_weights_seen_are_kept(run: Run) -> None:
    assert train(run, [5.0, 1.0, 3.0, 4.0], eval_every=1) == (1.0, [0, 1, 2, 3])
    assert "after 1 steps (best loss of 3)" in shown(run) and "1.0000" in shown(run)


def test_only_looks_count_and_the_last_step_is_one(run: Run) -> None:
    assert train(run, [5.0, 1.0, 3.0, 2.0, 1.5, 1.2], eval_every=2) == (5.0, [0, 2, 4, 5])


def test_a_metric_may_be_maximised_and_the_start_may_be_the_best(run: Run) -> None:
    assert train(run, [0.1, 0.3, 0.2], eval_every=1, best="accuracy")[0] == 1.0
    assert train(run, [0.9, 0.3, 0.2], eval_every=1, best="accuracy")[0] == 0.0


def test_of_equal_looks_the_first_is_kept(run: Run) -> None:
    assert train(run, [3.0, 1.0, 1.0], eval_every=1)[0] == 1.0


def test_every_step_and_every_look_is_a_line(run: Run) -> None:
    train(run, [5.0, 1.0, 3.0], eval_every=1)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"], line["loss"]) for line in lines] == [
        ("train/held_out", 0, 5.0), ("train", 0, 0.0), ("train/held_out", 1, 1.0), ("train", 1, 1.0),
        ("train/held_out", 2, 3.0),
    ]  # fmt: skip


def test_an_error_ends_the_phase_as_it_is(run: Run) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    monitor = Monitor(
        run, "train", 2, title="t", weights=Counter(weight), held_out=lambda: {"loss": weight.item()}, eval_every=1
    )
    with pytest.raises(KeyboardInterrupt), monitor:
        with torch.no_grad():
            weight += 1
        monitor.look(0)
        raise KeyboardInterrupt
    assert weight.item() == 1.0 and "held-out" not in shown(run)


def test_about_ten_lines_reach_the_console(run: Run) -> None:
    train(run, [1.0] * 51, eval_every=0)
    assert shown(run).count("/50  loss") == 10


def test_skipped_updates_of_policy_and_critic_are_said(run: Run) -> None:
    nan = float("nan")
    with Monitor(run, "train", 20, title="t") as monitor:
        monitor.log(2, {"loss": nan, "grad_norm": nan, "skipped_steps": 1.0, "restored": 1.0})
        monitor.log(
            3, {"loss": 1.0, "grad_norm": 1.0, "critic/loss": nan, "critic/grad_norm": nan, "critic/skipped_steps": 2.0}
        )
    policy, critic = shown(run).split("train 4/20: ")
    assert "train 3/20: loss nan, gradient norm nan: 1 of the step's updates skipped; weights and optimizer went" in policy
    assert "critic/loss nan, gradient norm nan: 2 of the step's updates skipped" in critic and "went back" not in critic
