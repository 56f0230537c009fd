"""Checkpoints of a training phase: when they are taken, what is in them, and going on from one.

They are taken between steps, when no request is pending and every trace of the steps before is in the batch that was learnt
from, so there is nothing of the rollout to keep; what comes next in the data, the sampling and the schedule follows from the
number of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mas_hpc.distributed.checkpoint_files import Phase, Position
from mas_hpc.distributed.checkpoints import Part
from mas_hpc.distributed.exchange import first_says
from mas_hpc.errors import RunStopped
from mas_hpc.phases.monitor import Monitor
from mas_hpc.resume import cut_back
from mas_hpc.run import Run
from mas_hpc.training.learner import Learner


class Keeper:
    """Takes the checkpoints of one phase of `steps` steps, after every checkpoint.every of them and after the last."""

    def __init__(self, run: Run, phase: Phase, steps: int, parts: Mapping[str, Part], monitor: Monitor) -> None:
        """`parts` by the name that they have in a checkpoint, in the order in which they are restored."""
        self._run, self._phase, self._steps = run, phase, steps
        self._parts: dict[str, Part] = {**parts, "monitor": monitor}
        self._monitor = monitor
        self._guards = [part.guard for part in parts.values() if isinstance(part, Learner)]
        for name, part in parts.items():
            if isinstance(part, Learner):
                part.guard.restore = self._back(name, part)

    def restore(self) -> int:
        """Put the parts where the run goes on from, if it does, and cut its records back to there; the first step to do."""
        run = self._run
        position = run.goes_on_from(self._phase)
        if run.checkpoints is None or position is None:
            return 0
        saved = run.checkpoints.open(position)
        for name, part in self._parts.items():
            part.restore(saved.under(name))
        if position == run.position:
            cut_back(run.folder, run.checkpoints, position, steps=run.config.method.steps)
        others = "" if saved.same_ranks else f", which {saved.marker.world_size} ranks wrote and {run.world.size} go on from"
        run.console.print(f"{self._phase}: goes on after step {position.step}/{self._steps}{others}", highlight=False)
        return position.step

    def keep(self, step: int) -> None:
        """Take a checkpoint after this step, if it is time for one, or the run is asked to end. Collective.

        None while steps are skipped: it would hold the weights that they were skipped with, and push out those before.
        Raises CheckpointError when one cannot be written, and RunStopped when the run ends here.
        """
        every, done = self._run.config.checkpoint.every, step + 1
        is_last, ends = done == self._steps, first_says(self._run.world, self._run.world.watch.is_asked_to_end)
        is_due = done % every == 0 and not any(guard.is_skipping for guard in self._guards) if every else False
        if ends or is_due or (every and is_last):
            self._save(done)
        if ends and not (is_last and self._phase == "train"):  # what is left after that takes no step
            raise RunStopped(f"{self._phase}: asked to end after step {done}/{self._steps}")

    def _save(self, done: int) -> None:
        if self._run.checkpoints is None:
            return
        with self._run.timer.part("checkpoint"):
            self._run.checkpoints.save(
                Position(phase=self._phase, step=done), {name: part.state() for name, part in self._parts.items()},
                is_end=done == self._steps, score=self._monitor.score(done),
            )  # fmt: skip

    def _back(self, name: str, learner: Learner) -> Callable[[], int | None]:
        """What the learner's guard calls when too many steps were skipped."""

        def go_back() -> int | None:
            checkpoints = self._run.checkpoints
            position = checkpoints.newest(self._phase) if checkpoints else None
            if checkpoints is None or position is None:
                return None
            learner.go_back(checkpoints.open(position).under(name))
            return position.step

        return go_back
