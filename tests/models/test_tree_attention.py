import math
import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.models.tree_blocks import CHAIN, SHARED, batched, cut, pruned
from mas_hpc.prefix_tree import merge

paths_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


def ancestors(tree):
    """The dense mask: query q (row) sees key k iff k is an ancestor or itself, by walking up the parents."""
    seen = np.zeros((len(tree), len(tree)), dtype=bool)
    for query in range(len(tree)):
        node = query
        while node >= 0:
            seen[query, node] = True
            node = tree.parent_T[node]
    return seen


def dense(tree, query, key, value, scaling):
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    score = (query @ key.transpose(1, 2) * scaling).masked_fill(~torch.from_numpy(ancestors(tree)), -torch.inf)
    return (score.softmax(-1) @ value).transpose(0, 1)


def heads(tree, *, query_heads=4, key_heads=2, dim=3):
    generator = torch.Generator().manual_seed(len(tree))
    shapes = [(count, len(tree), dim) for count in (query_heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_equals_dense(tree, limit, shared=SHARED, **shape):
    inputs = heads(tree, **shape)
    attend = TreeAttention(tree.leave_T, limit=limit, shared=shared)
    weight = torch.linspace(-1, 1, inputs[0].numel(), dtype=torch.float64)
    ours, reference = attend(0, *inputs, 0.7), dense(tree, *inputs, 0.7)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((out.reshape(-1) * weight).sum(), inputs) for out in (ours, reference)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(paths=paths_of_tokens, limit=st.integers(1, 40), shared=st.integers(1, 8))
def test_blocks_and_prefixes_show_each_query_its_ancestors_once_and_nothing_else(paths, limit, shared):
    tree = merge(paths)
    seen = np.zeros((len(tree), len(tree)), dtype=int)
    blocks, prefixes = cut(tree.leave_T, np.arange(len(tree)), limit=limit, shared=shared)
    for block in blocks:
        for query in block.queries:
            seen[query, block.keys] += (block.keys <= query) & (tree.leave_T[block.keys] > query)
    for prefix in prefixes:
        seen[prefix.first : prefix.last, prefix.keys] += 1
    assert sorted(query for block in blocks for query in block.queries) == list(range(len(tree)))
    assert (seen == ancestors(tree)).all()
    assert sorted(map(id, chain.from_iterable(batched(blocks)))) == sorted(map(id, blocks))


@settings(max_examples=100, deadline=None)
@given(paths=paths_of_tokens, limit=st.integers(1, 40), shared=st.integers(1, 8), data=st.data())
def test_some_queries_get_the_rows_that_all_would(paths, limit, shared, data):
    tree = merge(paths)
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(tree) - 1), min_size=1))))
    query, key, value = heads(tree)
    ours = TreeAttention(tree.leave_T, queries=chosen, limit=limit, shared=shared)(0, query[:, chosen], key, value, 0.7)
    reference = dense(tree, query, key, value, 0.7)[chosen]
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64)
    gradients = [torch.autograd.grad((out.reshape(-1) * weight).sum(), (query, key, value)) for out in (ours, reference)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(paths=paths_of_tokens, data=st.data())
def test_pruning_keeps_exactly_the_ancestors_of_queries(paths, data):
    tree = merge(paths)
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(tree) - 1), min_size=1))))
    seen = ancestors(tree)
    kept, leave_M, query_N = pruned(tree.leave_T, chosen)
    assert kept.tolist() == np.flatnonzero(seen[chosen].any(0)).tolist()
    assert kept[query_N].tolist() == chosen.tolist()
    index = np.arange(len(kept))
    assert ((index <= index[:, None]) & (index[:, None] < leave_M) == seen[np.ix_(kept, kept)]).all()


def num_pairs(attend):
    """Query-key pairs of the blocks, padding included."""
    return sum(math.prod(shape) * keys for shape, (_, keys) in zip(attend._query_shapes, attend._key_shapes, strict=True))


def prefixes_of(attend):
    return [(prefix.keys, prefix.queries) for prefix in attend._prefixes]


def test_the_last_token_of_a_chain_costs_its_length():
    tree = merge([list(range(3000))])
    assert num_pairs(TreeAttention(tree.leave_T, queries=np.array([2999]))) == 3000


def test_new_tokens_below_cached_chains_are_cut_into_runs():
    tree = merge([list(range(1200)), [*range(900), *range(2000, 2400)]])
    chosen = np.sort(np.concatenate([path[-350:] for path in tree.path_index]))
    attend = TreeAttention(tree.leave_T, queries=chosen, shared=10_000)
    query, key, value = heads(tree)
    ours = attend(0, query[:, chosen], key, value, 0.7)
    torch.testing.assert_close(ours, dense(tree, query, key, value, 0.7)[chosen], rtol=0, atol=1e-12)
    assert max(queries for _, queries in attend._query_shapes) <= CHAIN
    assert num_pairs(attend) < 2 * len(chosen) * 1300


def test_tokens_that_nobody_descends_from_are_no_keys():
    tree = merge([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]])
    attend = TreeAttention(tree.leave_T, queries=np.array([3]))
    query, key, value = heads(tree)
    hidden = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)[:, None]
    ours = attend(0, query[:, [3]], key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan), 0.7)
    torch.testing.assert_close(ours, dense(tree, query, key, value, 0.7)[[3]], rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(paths=paths_of_tokens, limit=st.integers(1, 40), shared=st.integers(1, 8))
def test_values_and_gradients_equal_a_dense_mask(paths, limit, shared):
    assert_equals_dense(merge(paths), limit, shared)


@pytest.mark.parametrize(("query_heads", "key_heads"), [(3, 3), (6, 2), (3, 1)])
def test_query_heads_share_key_heads_in_groups(query_heads, key_heads):
    assert_equals_dense(merge([[1, 2, 3, 4], [1, 2, 5], [7, 8]]), 2, query_heads=query_heads, key_heads=key_heads)


def test_long_branches_below_a_long_prefix_are_cut_into_runs():
    rng = random.Random(0)
    prefix = [rng.randrange(9) for _ in range(CHAIN + 20)]
    tree = merge([prefix + [rng.randrange(9) for _ in range(CHAIN + 40)] for _ in range(2)])
    blocks, prefixes = cut(tree.leave_T, np.arange(len(tree)), limit=64, shared=10_000)
    assert not prefixes
    assert max(block.num_queries for block in blocks if not block.causal) <= CHAIN
    assert_equals_dense(tree, 64, shared=10_000)


def test_a_long_prefix_is_one_call_and_equal_siblings_are_another_without_masks_or_copied_keys():
    state = list(range(300))
    tree = merge([state + [1000 * sibling + token for token in range(48)] for sibling in range(1, 9)])
    attend = TreeAttention(tree.leave_T)
    assert prefixes_of(attend) == [(slice(0, 300), slice(300, 684))]
    assert sorted(zip(attend._query_shapes, attend._visible, strict=True)) == [((1, 300), None), ((8, 48), None)]
    assert attend._key_shapes == attend._query_shapes
    assert_equals_dense(tree, 64)


def test_a_prefix_that_branches_twice_is_not_one_slice_of_keys():
    paths = [[1, 2, 3, 3, 3], [1, 2, 4, 4], [1, 2, 5, 5, 6, 6], [1, 2, 5, 5, 7], [1, 8]]
    tree = merge(paths)
    keys = [prefix.keys.tolist() for prefix in cut(tree.leave_T, np.arange(len(tree)), limit=1, shared=3)[1]]
    assert keys == [[0, 1, 7, 8]]
    assert_equals_dense(tree, 1, shared=3)


def test_scores_that_overflow_an_exponential_are_summed_as_one_softmax():
    tree = merge([[1, 2, 3, 4], [1, 2, 5], [7, 8]])
    query, key, value = heads(tree)
    attend = TreeAttention(tree.leave_T, limit=1, shared=1)
    ours = attend(0, query, key * 1e4, value, 1.0)
    torch.testing.assert_close(ours, dense(tree, query, key * 1e4, value, 1.0), rtol=0, atol=1e-12)
    assert all(part.isfinite().all() for part in torch.autograd.grad(ours.sum(), (query, key, value)))


def test_half_precision_is_summed_in_single():
    tree = merge([[*range(20), 100 + sibling, *range(9)] for sibling in range(6)])
    exact = [part.detach().bfloat16() for part in heads(tree, dim=16)]
    ours = TreeAttention(tree.leave_T, limit=4, shared=1)(0, *exact, 0.25)
    expected = dense(tree, *[part.double() for part in exact], 0.25)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=2e-2)


def test_whole_chains_need_no_mask_and_one_of_them_no_gather():
    attend = TreeAttention(merge([list(range(1000))]).leave_T)
    assert attend._visible == [None]
    assert (attend._query_X, attend._key_X, attend._place_N) == (None, None, None)


def test_no_mask_grows_with_the_square_of_the_forest():
    tree = merge([[i, *[i % 7] * 20, j, *range(30)] for i in range(50) for j in range(6)])
    pairs = sum(seen.numel() for seen in TreeAttention(tree.leave_T)._visible if seen is not None)
    assert len(tree) > 9000
    assert pairs < len(tree) * 150


def test_masks_follow_the_dtype_of_the_queries():
    tree = merge([[1, 2, 3], [1, 2, 4], [1, 5]])
    attend = TreeAttention(tree.leave_T)
    inputs = heads(tree)
    exact = attend(0, *inputs, 1.0)
    single = attend(0, *[tensor.float() for tensor in inputs], 1.0)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("paths", [[[1, 2, 3, 4, 5]], [[1, 2, 3, 4], [1, 2, 5], [7, 8]]], ids=["chain", "forest"])
def test_heads_and_gradients_may_lie_in_memory_in_any_way(paths):
    tree = merge(paths)
    plain = heads(tree)
    strided = [part.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_() for part in plain]
    assert strided[0].stride(-1) > 1
    found = []
    for inputs in (plain, strided):
        output = TreeAttention(tree.leave_T, limit=1, shared=2)(0, *inputs, 0.7)
        found.append([output, *torch.autograd.grad(output.sum(), inputs)])  # the gradient of a sum is one number, expanded
    reference = dense(tree, *plain, 0.7)
    expected = [reference, *torch.autograd.grad(reference.sum(), plain)]
    for ours in found:
        for got, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
