"""Where there is an accelerator FlexAttention's kernels run; elsewhere its eager mode does, and block masks are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as library

from mas_hpc.models import flex_attention
from mas_hpc.models.flex_attention import FLEX_DEVICES, TILE, FlexTreeAttention, block_grids, block_mask, tree_attention
from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.prefix_tree import merge

paths_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


def long_forest():
    """More tokens than a block, branches above and below block borders."""
    return merge([list(range(200)), [*range(150), *range(900, 1000)], [*range(20), 7], [500, *range(60)]])


def heads(tree, queries, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(tree))
    shapes = [(6, len(queries), 16), (2, len(tree), 16), (2, len(tree), 16)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def chosen_queries(tree):
    return {"all": np.arange(len(tree)), "some": np.sort(np.concatenate([path[-7:] for path in tree.path_index]))}


@pytest.fixture
def eager(monkeypatch):
    """The library refuses gradients on a CPU, where only its compiled kernels lack them."""
    monkeypatch.setattr(library, "_validate_device", lambda query, key, value: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("which", ["all", "some"])
def test_values_and_gradients_equal_the_blocks_of_sdpa(eager, which):
    tree = long_forest()
    queries = chosen_queries(tree)[which]
    inputs = heads(tree, queries)
    ours = FlexTreeAttention(tree.leave_T, queries=queries)(0, *inputs, 0.3)
    blocks = TreeAttention(tree.leave_T, queries=queries)(0, *inputs, 0.3)
    torch.testing.assert_close(ours, blocks, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64)
    gradients = [torch.autograd.grad((out.reshape(-1) * weight).sum(), inputs) for out in (ours, blocks)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(paths=paths_of_tokens, tile=st.integers(1, 8), data=st.data())
def test_blocks_are_those_of_the_dense_mask(paths, tile, data):
    tree = merge(paths)
    queries = np.array(sorted(data.draw(st.sets(st.integers(0, len(tree) - 1), min_size=1))))
    keys = np.arange(len(tree))
    seen = (keys <= queries[:, None]) & (queries[:, None] < tree.leave_T)
    rows, columns = -(-len(queries) // tile) * tile, -(-len(tree) // tile) * tile
    hidden = np.pad(seen, ((0, rows - len(queries)), (0, columns - len(tree))))
    whole = np.pad(hidden[: len(queries)], ((0, rows - len(queries)), (0, 0)), mode="edge")
    tiles = [grid.reshape(rows // tile, tile, columns // tile, tile) for grid in (hidden, whole)]
    touched, full = block_grids(tree.leave_T, queries, tile)
    assert (touched == tiles[0].any((1, 3))).all()
    # A last block of queries counts as whole by its real ones; the padded ones repeat the last of them.
    assert (full == tiles[1].all((1, 3))).all()


@pytest.mark.parametrize("which", ["all", "some"])
def test_the_library_finds_the_same_blocks_by_looking_at_every_pair(which):
    tree = long_forest()
    ours = block_mask(tree.leave_T, chosen_queries(tree)[which], "cpu")
    theirs = library.create_block_mask(ours.mask_mod, None, None, *ours.seq_lengths, device="cpu", BLOCK_SIZE=TILE)
    assert (ours.to_dense() == theirs.to_dense()).all()
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


def test_a_cpu_gets_blocks_of_sdpa_and_an_accelerator_the_compiled_call(monkeypatch):
    tree = merge([[1, 2, 3], [1, 4]])
    assert isinstance(tree_attention(tree.leave_T), TreeAttention)
    monkeypatch.setattr(flex_attention, "FLEX_DEVICES", ("cpu",))
    attend = tree_attention(tree.leave_T, queries=np.array([1, 3]))
    assert isinstance(attend, FlexTreeAttention)
    assert attend._function is flex_attention._compiled()


@pytest.mark.skipif(
    not any(getattr(torch, kind).is_available() for kind in FLEX_DEVICES), reason=f"no accelerator: {' or '.join(FLEX_DEVICES)}"
)
@pytest.mark.parametrize("which", ["all", "some"])
def test_an_accelerator_gives_the_values_and_gradients_of_the_cpu(which):
    device = torch.accelerator.current_accelerator()
    tree = long_forest()
    queries = chosen_queries(tree)[which]
    inputs = heads(tree, queries, torch.float32)
    moved = [part.detach().to(device).requires_grad_() for part in inputs]
    ours = tree_attention(tree.leave_T, queries=queries, device=device)(0, *moved, 0.3)
    blocks = TreeAttention(tree.leave_T, queries=queries)(0, *inputs, 0.3)
    torch.testing.assert_close(ours.cpu(), blocks, rtol=1e-3, atol=1e-3)  # products may be TF32
    weight = torch.linspace(-1, 1, ours.numel()).view_as(blocks)
    for got, expected in zip(
        torch.autograd.grad((ours * weight.to(device)).sum(), moved),
        torch.autograd.grad((blocks * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_one_compiled_call_skips_blocks_and_serves_forests_of_all_sizes(monkeypatch):
    """The compiler's CPU kernels read the block mask, as those of accelerators do and eager mode does not."""
    monkeypatch.setattr(flex_attention, "FLEX_DEVICES", ("cpu",))
    graphs = []
    for tree in (long_forest(), merge([list(range(300)), [*range(100), *range(900, 1300)]])):
        inputs = [part.detach() for part in heads(tree, tree.token_T, torch.float32)]
        ours = tree_attention(tree.leave_T)(0, *inputs, 0.3)
        torch.testing.assert_close(ours, TreeAttention(tree.leave_T)(0, *inputs, 0.3), rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
