"""Trees dealt out to ranks by what they cost: tokens, and the pairs that attention computes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mas_hpc.training.share import share, tree_cost
from mas_hpc.types import Sample

PAIRS_ALONE = 0
"""Hidden size at which a token costs nothing but what it attends to."""


def sample(tree: str, prompt: Sequence[int], completion: Sequence[int], policy: str = "a") -> Sample:
    prompt_ids, completion_ids = tuple(prompt), tuple(completion)
    return Sample(
        id=f"{tree}/{policy}/{completion_ids[:1]}", tree=tree, agent=policy, policy=policy, prompt_ids=prompt_ids,
        prompt_spans=(("", len(prompt_ids)),), completion_ids=completion_ids,
    )  # fmt: skip


def test_a_chain_costs_its_tokens_and_its_triangle() -> None:
    chain = [sample("t", range(3), (7, 8))]
    assert tree_cost(chain, hidden_size=PAIRS_ALONE) == 1 + 2 + 3 + 4 + 5
    assert tree_cost(chain, hidden_size=10) == 15 + 5 * 60


def test_a_shared_prompt_is_paid_once_and_its_branches_attend_to_it() -> None:
    tree = [sample("t", range(3), (7, 8)), sample("t", range(3), (9, 9))]
    assert tree_cost(tree, hidden_size=PAIRS_ALONE) == 6 + (4 + 5) + (4 + 5)
    assert tree_cost(tree, hidden_size=1) - tree_cost(tree, hidden_size=0) == 6 * 7


def test_a_turn_that_goes_on_from_another_pays_what_is_new() -> None:
    turns = [sample("t", range(3), (7, 8)), sample("t", (0, 1, 2, 7, 8), (9,))]
    assert tree_cost(turns, hidden_size=1) == 6 * 6 + 21


def test_adapters_that_cover_prompts_share_no_token_between_policies() -> None:
    tree = [sample("t", range(3), (7,), "a"), sample("t", range(3), (8,), "b")]
    assert tree_cost(tree, hidden_size=1) == 6 * 5 + 6 + 4 + 4
    assert tree_cost(tree, hidden_size=1, by_policy=True) == 2 * tree_cost(tree[:1], hidden_size=1)


def long_tail() -> list[Sample]:
    """Few very long chains and many short ones, as rollouts have them: half of the tokens are in long ones."""
    lengths = [1600, 1400, 1100, 1000, 1000, *[60] * 120]
    return [sample(f"t{number:03}", range(1), range(2, length)) for number, length in enumerate(lengths)]


def imbalance(parts: Sequence[Sequence[Sample]], hidden_size: int) -> float:
    """Cost of the busiest rank over the mean."""
    costs = [sum(tree_cost([chain], hidden_size=hidden_size) for chain in part) for part in parts]
    return max(costs) / (sum(costs) / len(costs))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_long_tail_is_balanced_better_than_by_tokens_alone(size: int) -> None:
    forest, width = long_tail(), 32
    by_cost = [share(forest, rank, size, hidden_size=width) for rank in range(size)]
    # So wide a model that its attention costs nothing beside its matrices: a deal by tokens.
    by_tokens = [share(forest, rank, size, hidden_size=10**9) for rank in range(size)]
    tokens = [[sum(len(s.prompt_ids + s.completion_ids) for s in part) for part in parts] for parts in (by_cost, by_tokens)]
    assert max(tokens[1]) <= max(tokens[0])
    assert imbalance(by_cost, width) < 1.01
    assert imbalance(by_tokens, width) > 1.03


def test_every_tree_has_one_rank() -> None:
    forest = long_tail()
    dealt = [s.id for rank in range(3) for s in share(forest, rank, 3, hidden_size=32)]
    assert sorted(dealt) == sorted(s.id for s in forest)
