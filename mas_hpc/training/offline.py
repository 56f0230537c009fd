"""The loop over samples that exist: pack -> learn, with a look at held-out ones now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import Objective
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample

Log = Callable[[int, Mapping[str, float]], None]


def fit_offline(
    *, batch: Callable[[int], Sequence[Sample]], learner: Learner, objective: Objective, log: Log, steps: range,
    look: Callable[[int], None], keep: Callable[[int], None],
) -> None:  # fmt: skip
    """Train on `batch(step)` for every step, let `look` evaluate and `keep` take checkpoints; counts are those of the batch."""
    for step in steps:
        samples = batch(step)
        log(step, learner.update(samples, objective, Totals.of(samples)))
        look(step)
        keep(step)
