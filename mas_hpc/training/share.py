"""Which samples this rank trains on, and the counts that all ranks divide by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mas_hpc.prefix_tree import common_length
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


def share(samples: Sequence[Sample], rank: int, size: int, *, hidden_size: int, by_policy: bool = False) -> list[Sample]:
    """This rank's trees: dearest first, each to the rank with the least cost so far. The same answer on every rank.

    `hidden_size` and `by_policy` as in tree_cost.
    """
    if size == 1:
        return list(samples)
    trees: Mapping[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        trees[sample.tree].append(sample)
    cost = {name: tree_cost(tree, hidden_size=hidden_size, by_policy=by_policy) for name, tree in trees.items()}
    load = [0] * size
    mine = []
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        target = load.index(min(load))
        load[target] += cost[name]
        if target == rank:
            mine += trees[name]
    return mine


def tree_cost(samples: Sequence[Sample], *, hidden_size: int, by_policy: bool = False) -> int:
    """What one tree costs to train on, in pairs of a query and a key that it attends to: 6 D per token, and the pairs.

    A layer of width D has about 12 D^2 weights, which take 24 D^2 operations a token; a pair takes 4 D (arXiv 2001.08361,
    section 2.1). A token that ends a path of length n attends to n keys, so a segment of s tokens below a path of p has
    s p + s (s + 1) / 2 pairs. `by_policy`: an adapter covers prompts too, so policies share no token.

    Example: two completions of 2 tokens after a prompt of 3 are 7 tokens and 6 + 9 + 9 pairs: 66 at D = 1.
    """
    paths = sorted((sample.policy if by_policy else "", sample.prompt_ids + sample.completion_ids) for sample in samples)
    cost = 0
    above: tuple[int, ...] = ()
    owner = ""
    for policy, path in paths:
        shared = common_length(path, above) if policy == owner else 0
        new, pairs = len(path) - shared, (len(path) * (len(path) + 1) - shared * (shared + 1)) // 2
        cost += 6 * hidden_size * new + pairs
        above, owner = path, policy
    return cost
