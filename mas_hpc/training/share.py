"""Which samples this rank trains on, and the counts that all ranks divide by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mas_hpc.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Global denominators of a loss: over all forests and ranks of one update.

    Example: Totals.of(samples).num_tokens
    """

    num_tokens: int
    num_samples: int

    @staticmethod
    def of(samples: Sequence[Sample]) -> Totals:
        """Count trained tokens, and the samples that have one; each at least 1."""
        tokens = [num_trained_tokens(sample) for sample in samples]
        return Totals(num_tokens=max(sum(tokens), 1), num_samples=max(sum(map(bool, tokens)), 1))


def num_trained_tokens(sample: Sample) -> int:
    """Completion tokens that the mask leaves."""
    return sum(sample.loss_mask) if sample.loss_mask else len(sample.completion_ids)


def share(samples: Sequence[Sample], rank: int, size: int) -> list[Sample]:
    """This rank's trees: largest first, each to the rank with the fewest tokens so far. The same answer on every rank."""
    if size == 1:
        return list(samples)
    trees: Mapping[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        trees[sample.tree].append(sample)
    cost = {
        name: max(len(s.prompt_ids) for s in tree) + sum(len(s.completion_ids) for s in tree) for name, tree in trees.items()
    }
    load = [0] * size
    mine = []
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        target = load.index(min(load))
        load[target] += cost[name]
        if target == rank:
            mine += trees[name]
    return mine
