"""What a training phase shows and keeps: metrics, looks at held-out data, and the best weights among those looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan

import torch
from rich.table import Table
from torch.nn import Parameter

from mas_hpc.run import Run

SHOWN = ("loss", "accuracy", "entropy", "reward", "rewards/accuracies", "rewards/margins", "kl", "value/error")


class Monitor:
    """Logs one phase of `steps` steps; about ten lines of it go to the console, with a progress bar."""

    def __init__(
        self, run: Run, phase: str, steps: int, *, title: str, parameters: Sequence[Parameter] = (),
        held_out: Callable[[], Mapping[str, float]] | None = None, eval_every: int = 0, best: str = "-loss",
    ) -> None:  # fmt: skip
        """`best` is the held-out metric that is maximised, or with a minus sign before it minimised."""
        self._run, self._phase, self._steps = run, phase, steps
        self._parameters, self._held_out, self._every = parameters, held_out, eval_every
        self._sign, self._key = (-1.0 if best.startswith("-") else 1.0), best.removeprefix("-")
        self._looks: dict[int, Mapping[str, float]] = {}
        self._kept: tuple[int, list[torch.Tensor]] | None = None
        self._bar, self._advance = run.progress(title, steps)

    def __enter__(self) -> Monitor:
        self._look(0)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step that has ended."""
        self._run.log(self._phase, step, metrics)
        self._advance()
        every = max(1, self._steps // 10)
        if self._run.world.is_first and ((step + 1) % every == 0 or step + 1 == self._steps):
            shown = [name for name in metrics if name in SHOWN or name.startswith("reward/")]
            values = "  ".join(f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in shown)
            self._run.console.print(f"{self._phase} {step + 1}/{self._steps}  {values}", highlight=False)

    def look(self, step: int) -> None:
        """Evaluate after every `eval_every` steps, and after the last."""
        done = step + 1
        if done == self._steps or (self._every and done % self._every == 0):
            self._look(done)

    def _look(self, done: int) -> None:
        if self._held_out is None:
            return
        self._looks[done] = self._held_out()
        self._run.log(f"{self._phase}/held_out", done, self._looks[done])
        if self._every and (self._kept is None or self._score(done) > self._score(self._kept[0])):
            self._kept = (done, [parameter.detach().to("cpu", copy=True) for parameter in self._parameters])

    def _score(self, done: int) -> float:
        value = self._sign * self._looks[done][self._key]
        return -inf if isnan(value) else value

    def _finish(self) -> None:
        """Go back to the best weights, and show held-out metrics before and after."""
        if self._held_out is None or self._steps not in self._looks:
            return
        last = self._steps
        if self._kept and self._kept[0] != last:
            last, weights = self._kept
            with torch.no_grad():
                for parameter, weight in zip(self._parameters, weights, strict=True):
                    parameter.copy_(weight)
        if self._run.world.is_first:
            self._run.console.print(self._table(last))

    def _table(self, last: int) -> Table:
        kept = f"after {last} steps" + ("" if last == self._steps else f" (best {self._key} of {self._steps})")
        table = Table("metric", title=f"{self._phase}: held-out data", title_justify="left")
        table.add_column("before", justify="right")
        table.add_column(kept, justify="right")
        for name, value in self._looks[last].items():
            table.add_row(name, f"{self._looks[0].get(name, float('nan')):.4f}", f"{value:.4f}")
        return table
