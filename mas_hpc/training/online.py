"""The loop that makes its own samples: collect -> credit -> learn -> push."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mas_hpc.training.offline import Log
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample

Collected = TypeVar("Collected")


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """What one optimizer step learns from; samples without a gradient may be absent, but the totals count them."""

    samples: Sequence[Sample]
    totals: Totals


@dataclass(frozen=True, kw_only=True)
class Online(Generic[Collected]):
    """The verbs of the loop, in time order.

    `learn` takes one minibatch and returns its metrics; `push` serves the new weights as a version; `look` evaluates; `keep`
    takes checkpoints.
    """

    collect: Callable[[int], Collected]
    credit: Callable[[Collected], tuple[Sequence[Minibatch], Mapping[str, float]]]
    learn: Callable[[int, Minibatch], Mapping[str, float]]
    push: Callable[[int], object]
    log: Log
    look: Callable[[int], None]
    keep: Callable[[int], None]


def fit_online(loop: Online[Collected], steps: range) -> None:
    """Collect traces, turn them into minibatches, learn from each, and serve the new weights as version step + 1."""
    for step in steps:
        minibatches, metrics = loop.credit(loop.collect(step))
        learned = [loop.learn(step, minibatch) for minibatch in minibatches]
        loop.push(step + 1)
        loop.log(step, {**metrics, **mean(learned)})
        loop.look(step)
        loop.keep(step)


COUNTED = ("skipped_steps", "restored")
"""Metrics of a step, of the policy or of critic/..., that are added up."""


def mean(learned: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over optimizer steps of each metric; extremes stay extremes, and what is counted is counted."""
    joined: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics in learned for name in metrics):
        values = [metrics[name] for metrics in learned if name in metrics]
        pick = max if name.endswith("/max") else min if name.endswith("/min") else sum if name.endswith(COUNTED) else None
        joined[name] = pick(values) if pick else sum(values) / len(values)
    return joined
