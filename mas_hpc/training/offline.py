"""The loop over samples that exist: pack -> learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import Loss
from mas_hpc.types import Sample


def fit_offline(
    *, batch: Callable[[int], Sequence[Sample]], learner: Learner, loss: Loss, log: Callable[[int, Mapping[str, float]], None],
    steps: range,
) -> None:  # fmt: skip
    """Train on `batch(step)` for every step; the denominator is the number of trained tokens of the batch."""
    for step in steps:
        samples = batch(step)
        log(step, learner.update(samples, loss, num_tokens=num_trained_tokens(samples)))


def num_trained_tokens(samples: Sequence[Sample]) -> int:
    """Completion tokens that the masks leave."""
    return sum(sum(sample.loss_mask) if sample.loss_mask else len(sample.completion_ids) for sample in samples)
