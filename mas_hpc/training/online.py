"""The loop that makes its own samples: collect -> credit -> learn -> push."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import Loss
from mas_hpc.types import Sample, Trace

Credit = Callable[[Sequence[Trace]], tuple[Sequence[Sample], int, Mapping[str, float]]]


def fit_online(
    *, collect: Callable[[int], Sequence[Trace]], credit: Credit, learner: Learner, loss: Loss, push: Callable[[int], None],
    log: Callable[[int, Mapping[str, float]], None], steps: range, updates_per_batch: int = 1,
) -> None:  # fmt: skip
    """Collect traces, turn them into samples, learn, and serve the new weights as version step + 1.

    `credit` returns samples, the global number of tokens that their losses are divided by, and metrics of the batch.
    """
    for step in steps:
        samples, num_tokens, metrics = credit(collect(step))
        for _ in range(updates_per_batch):
            learned = learner.update(samples, loss, num_tokens=max(num_tokens, 1))
        push(step + 1)
        log(step, {**metrics, **learned})
