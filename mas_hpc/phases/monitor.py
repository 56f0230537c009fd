"""What a training phase shows and keeps: metrics, looks at held-out data, and the best weights among those looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isnan
from typing import Protocol

from rich.table import Table
from torch import Tensor

from mas_hpc.distributed.checkpoints import Saved, State
from mas_hpc.run import Run
from mas_hpc.training.profiling import Profiler

SHOWN = ("loss", "accuracy", "entropy", "reward", "rewards/accuracies", "rewards/margins", "kl", "value/error")


class Weights(Protocol):
    """Whoever holds what is trained, such as a Learner."""

    def weights(self) -> dict[str, Tensor]:
        """A copy of them. Collective."""
        ...

    def put_back(self, weights: Mapping[str, Tensor]) -> None:
        """Go back to a copy. Collective."""
        ...


class Monitor:
    """Logs one phase of `steps` steps; about ten lines of it go to the console, with a progress bar."""

    def __init__(
        self, run: Run, phase: str, steps: int, *, title: str, weights: Weights | None = None,
        held_out: Callable[[], Mapping[str, float]] | None = None, eval_every: int = 0, best: str = "-loss",
    ) -> None:  # fmt: skip
        """`best` is the held-out metric that is maximised, or with a minus sign before it minimised, for these `weights`."""
        self._run, self._phase, self._steps = run, phase, steps
        self._weights, self._held_out, self._every = weights, held_out, eval_every
        self._sign, self._key = (-1.0 if best.startswith("-") else 1.0), best.removeprefix("-")
        self._looks: dict[int, Mapping[str, float]] = {}
        self._kept: tuple[int, dict[str, Tensor]] | None = None
        self._start = 0
        self._bar, self._advance = run.progress(title, steps)
        self._profiler = Profiler(run.folder, run.world.rank, run.config.profile)

    def __enter__(self) -> Monitor:
        self._run.world.watch.at(self._phase, self._start)
        if not self._start:
            self._look(0)
        self._bar.start()
        self._run.timer.start()
        self._profiler.begin(self._phase, self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step that has ended, and what it took; looks and checkpoints are in those of the next."""
        self._profiler.end(step)
        self._run.log(self._phase, step, {**metrics, **self._run.timer.lap()})
        self._run.world.watch.at(self._phase, step + 1)
        self._advance()
        self._say_what_was_skipped(step, metrics)
        every = max(1, self._steps // 10)
        if self._run.world.is_first and ((step + 1) % every == 0 or step + 1 == self._steps):
            shown = [name for name in metrics if name in SHOWN or name.startswith("reward/")]
            values = "  ".join(f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in shown)
            self._run.console.print(f"{self._phase} {step + 1}/{self._steps}  {values}", highlight=False)

    def _say_what_was_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Updates whose loss or gradient was not finite, of the policy or of the critic."""
        for name in metrics:
            if self._run.world.is_first and name.endswith("skipped_steps"):
                who = name.removesuffix("skipped_steps")
                back = "; weights and optimizer went back to the last checkpoint" if f"{who}restored" in metrics else ""
                self._run.console.print(
                    f"[yellow]{self._phase} {step + 1}/{self._steps}: {who}loss {metrics[f'{who}loss']:g}, gradient norm "
                    f"{metrics[f'{who}grad_norm']:g}: {metrics[name]:g} of the step's updates skipped{back}[/yellow]"
                )

    def look(self, step: int) -> None:
        """Evaluate after every `eval_every` steps, and after the last."""
        done = step + 1
        if done == self._steps or (self._every and done % self._every == 0):
            with self._run.timer.part("evaluation"):
                self._look(done)
        self._profiler.begin(self._phase, done)

    def _look(self, done: int) -> None:
        if self._held_out is None:
            return
        self._looks[done] = self._held_out()
        self._run.log(f"{self._phase}/held_out", done, self._looks[done])
        if self._every and (self._kept is None or self._score(done) > self._score(self._kept[0])):
            self._kept = (done, self._weights.weights() if self._weights else {})

    def score(self, done: int) -> float | None:
        """The held-out metric after so many steps, larger is better; None where nobody looked."""
        return self._score(done) if done in self._looks else None

    def state(self) -> State:
        """Of a checkpoint: what the looks saw, and the best weights."""
        best, weights = self._kept or (None, {})
        return State(tensors=weights, record={"looks": {str(done): look for done, look in self._looks.items()}, "best": best})

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint; what came before it is neither looked at nor logged again. Collective."""
        record = saved.record
        self._looks = {int(done): look for done, look in record["looks"].items()}
        self._start = saved.marker.position.step
        for _ in range(self._start):
            self._advance()
        if record["best"] is not None and self._weights:
            weights = self._weights.weights()
            saved.fill(weights)
            self._kept = (record["best"], weights)

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
            if self._weights:
                self._weights.put_back(weights)
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
