import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.rollout.native.kv_tree import KVTree, Node, adapters_of, path_keys, tokens_of
from mas_hpc.rollout.native.prefill import plan


def keys(*token_ids: int, adapter: int = -1) -> np.ndarray:
    return path_keys(token_ids, [adapter] * len(token_ids))


def nodes(tree: KVTree) -> list[Node]:
    return list(tree._nodes())


def test_a_key_holds_token_and_adapter() -> None:
    key_T = path_keys([0, 49151, 7], [-1, 0, 300])
    assert tokens_of(key_T).tolist() == [0, 49151, 7] and adapters_of(key_T).tolist() == [-1, 0, 300]


def test_a_common_prefix_is_one_node_and_a_handle_survives_the_cut() -> None:
    tree = KVTree(100)
    first = tree.insert(keys(1, 2, 3, 4))
    second = tree.insert(keys(1, 2, 5))
    assert tree.used == 5
    assert [tokens_of(node.key_N).tolist() for node in first.path()] == [[1, 2], [3, 4]]
    assert [tokens_of(node.key_N).tolist() for node in second.path()] == [[1, 2], [5]]
    assert tree.insert(keys(1, 2, 3, 4)) is first and first.end == 4
    assert len(set(first.slots()) | set(second.slots())) == 5


def test_the_same_tokens_under_another_adapter_are_others() -> None:
    tree = KVTree(100)
    assert tree.insert(keys(1, 2)) is not tree.insert(keys(1, 2, adapter=0))
    assert tree.used == 4


def test_a_path_that_ends_inside_a_node_ends_a_node() -> None:
    tree = KVTree(100)
    long = tree.insert(keys(1, 2, 3))
    short = tree.insert(keys(1, 2))
    assert short.end == 2 and long.path() == [short, long]


def test_what_was_unread_for_longest_goes_first_and_what_is_pinned_stays() -> None:
    tree = KVTree(6)
    pinned = tree.hold(keys(1, 2), 0)
    old, new = tree.insert(keys(3, 4)), tree.insert(keys(5, 6))
    tree.insert(keys(3, 4))  # read again
    assert tree.make_room(2)
    assert new not in nodes(tree) and {pinned, old} <= set(nodes(tree)) and tree.evicted == 2
    assert not tree.make_room(5) and tree.evicted == 2, "nothing goes in vain"
    assert tree.make_room(4)
    assert nodes(tree) == [pinned] and tree.used == 2


def test_an_inner_node_goes_after_its_children() -> None:
    tree = KVTree(4)
    tree.insert(keys(1, 2, 3))
    tree.insert(keys(1, 4))
    assert tree.used == 4 and tree.make_room(4)
    assert nodes(tree) == [] and tree.evicted == 4
    assert sorted(tree.insert(keys(7, 8, 9, 10)).slots()) == [0, 1, 2, 3]


def test_holding_a_path_never_evicts_its_own_beginning() -> None:
    tree = KVTree(4)
    tree.insert(keys(1, 2))
    tree.insert(keys(3, 4))
    held = tree.hold(keys(1, 2, 5, 6), 0)
    assert held is not None and held.end == 4 and tree.evicted == 2
    assert tree.hold(keys(8), 0) is None
    tree.unpin(held)
    assert tree.hold(keys(8), 3) is not None


def test_what_is_filled_below_a_prompt_is_written_once() -> None:
    tree = KVTree(100)
    prompt = tree.insert(keys(1, 2))
    assert [place for place, _ in tree.fill(keys(3, 4), below=prompt)] == [0, 1]
    assert [place for place, _ in tree.fill(keys(3, 4, 5), below=prompt)] == [2]
    assert tree.fill(keys(3), below=prompt) == []


paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


@given(paths, st.integers(6, 30))
@settings(max_examples=200, deadline=None)
def test_every_slot_has_one_owner_and_counts_agree_whatever_comes(paths: list[list[int]], capacity: int) -> None:
    tree, held = KVTree(capacity), []
    for number, path in enumerate(paths):
        leaf = tree.hold(keys(*path), 0)
        if leaf is not None:
            held.append((path, leaf))
        if len(held) > 2:
            tree.unpin(held.pop(number % len(held))[1])
        slots = [int(slot) for node in nodes(tree) for slot in node.slot_N]
        assert len(slots) == len(set(slots)) == tree.used <= capacity and all(slot < capacity for slot in slots)
        for path, leaf in held:
            found = np.concatenate([node.key_N for node in leaf.path()])
            assert tokens_of(found).tolist() == path and all(node.pins for node in leaf.path())
    for _, leaf in held:
        tree.unpin(leaf)
    assert not any(node.pins for node in nodes(tree))


# ---- chunks


def test_a_chunk_is_the_missing_tokens_in_depth_first_order_below_their_ancestors() -> None:
    tree = KVTree(100)
    prefix = tree.insert(keys(5, 6))
    prefix.filled = 2
    first, second = tree.insert(keys(5, 6, 7)), tree.insert(keys(5, 6, 8))
    chunk = plan([first, second], limit=10)
    assert chunk is not None
    assert chunk.leave_F.tolist() == [4, 4, 3, 4] and chunk.query_N.tolist() == [2, 3]
    assert chunk.token_N.tolist() == [7, 8] and chunk.position_N.tolist() == [2, 2]
    assert chunk.slot_F.tolist() == [*prefix.slot_N, *first.slot_N, *second.slot_N]
    assert chunk.ends == ((first, 0), (second, 1)) and chunk.is_stored_N.all()


def test_a_prompt_that_is_there_has_only_its_last_token_run_again_and_not_stored() -> None:
    tree = KVTree(100)
    leaf = tree.insert(keys(5, 6, 7))
    leaf.filled = 3
    chunk = plan([leaf], limit=10)
    assert chunk is not None and chunk.token_N.tolist() == [7] and chunk.position_N.tolist() == [2]
    assert not chunk.is_stored_N.any() and chunk.ends == ((leaf, 0),)


def test_limits_cut_prompts_into_chunks_and_nothing_is_run_twice() -> None:
    tree = KVTree(100)
    leaves = [tree.insert(keys(1, 2, 3, last)) for last in (4, 5)]
    chunks = []
    while waiting := [leaf for leaf in leaves if leaf not in [end for chunk in chunks for end, _ in chunk.ends]]:
        chunks.append(plan(waiting, limit=2))
    assert [chunk.token_N.tolist() for chunk in chunks] == [[1, 2], [3, 4], [5]]
    assert [[end for end, _ in chunk.ends] for chunk in chunks] == [[], [leaves[0]], [leaves[1]]]


def test_nothing_to_do_is_no_chunk() -> None:
    assert plan([], limit=5) is None


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_every_missing_token_is_run_exactly_once_whatever_the_limit(limit: int) -> None:
    tree = KVTree(1000)
    rng = np.random.default_rng(0)
    leaves = [tree.insert(keys(*rng.integers(0, 2, size=rng.integers(1, 9)))) for _ in range(30)]
    waiting, run = dict.fromkeys(leaves), 0
    while waiting:
        chunk = plan(waiting, limit)
        assert chunk is not None and len(chunk) <= limit
        run += int(chunk.is_stored_N.sum())
        for leaf, _ in chunk.ends:
            del waiting[leaf]
    assert run == tree.used
