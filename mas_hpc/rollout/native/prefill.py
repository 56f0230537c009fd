"""Which tokens of which prompts one forward pass runs: no tensors here, and no model.

A chunk is a part of the KV tree: new tokens in depth-first order, below ancestors whose keys and values are there.
Legend: F tokens of the forest (ancestors and new ones), N new tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mas_hpc.prefix_tree import IntArray
from mas_hpc.rollout.native.kv_tree import Node, adapters_of, tokens_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens start..stop of a node; `is_stored` is False where only the hidden state is wanted.

    Example: Part(start=0, stop=12)
    """

    start: int
    stop: int
    is_stored: bool = True

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """One pass of prefill.

    Example: of paths [5, 6, 7] and [5, 6, 8] whose first two tokens are filled: leave_F [4, 4, 3, 4], query_N [2, 3].
    """

    leave_F: IntArray
    """End of each token's subtree, as in PrefixTree."""
    slot_F: IntArray
    query_N: IntArray
    """Places of the new tokens in the forest, ascending."""
    token_N: IntArray
    position_N: IntArray
    adapter_N: IntArray
    is_stored_N: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """False where keys and values are there, and only the hidden state is wanted."""
    ends: tuple[tuple[Node, int], ...]
    """The leaves that are complete after this pass, and which of the N tokens is the last of each."""

    def __len__(self) -> int:
        return len(self.query_N)


def plan(leaves: Iterable[Node], limit: int) -> Chunk | None:
    """At most `limit` tokens that the paths to these leaves, first ones first, still need; None when there is no leaf.

    A leaf whose path is complete has its last token run again, for its hidden state. Marks what it plans as filled.
    """
    parts: dict[Node, Part] = {}
    ends: dict[Node, None] = {}
    left = limit
    for leaf in leaves:
        if left <= 0:
            break
        for node in leaf.path():
            count = min(len(node) - node.filled, left)
            if count:
                parts[node] = Part(start=node.filled, stop=node.filled + count)
                node.filled += count
                left -= count
            if node.filled < len(node):
                break
        if leaf.filled == len(leaf):
            ends[leaf] = None
            if leaf not in parts:
                parts[leaf] = Part(start=len(leaf) - 1, stop=len(leaf), is_stored=False)
                left -= 1
    return _chunk(parts, tuple(ends)) if parts else None


def _chunk(parts: Mapping[Node, Part], ends: Sequence[Node]) -> Chunk:
    nodes, after = _depth_first(parts)
    begins = np.cumsum([0, *(node.filled for node in nodes)])
    begin = dict(zip(nodes, begins.tolist(), strict=False))
    runs = [(node, parts[node]) for node in nodes if node in parts]
    key_N = np.concatenate([node.key_N[part.start : part.stop] for node, part in runs])
    last = dict(zip((node for node, _ in runs), (np.cumsum([len(part) for _, part in runs]) - 1).tolist(), strict=True))
    return Chunk(
        leave_F=np.repeat(begins[after], [node.filled for node in nodes]),
        slot_F=np.concatenate([node.slot_N[: node.filled] for node in nodes]),
        query_N=np.concatenate([begin[node] + np.arange(part.start, part.stop) for node, part in runs]),
        token_N=tokens_of(key_N), adapter_N=adapters_of(key_N),
        position_N=np.concatenate([node.depth + np.arange(part.start, part.stop) for node, part in runs]),
        is_stored_N=np.repeat([part.is_stored for _, part in runs], [len(part) for _, part in runs]),
        ends=tuple((leaf, last[leaf]) for leaf in ends),
    )  # fmt: skip


def _depth_first(parts: Iterable[Node]) -> tuple[list[Node], list[int]]:
    """The nodes with all their ancestors, parents first; and for each the place after its subtree."""
    below: dict[Node | None, list[Node]] = defaultdict(list)
    seen: set[Node] = set()
    for part in parts:
        for node in part.path():
            if node not in seen:
                seen.add(node)
                below[node.parent].append(node)
    tops = below[next(parent for parent in below if parent is not None and parent.parent is None)]
    nodes: list[Node] = []
    pending = tops[::-1]
    while pending:
        nodes.append(node := pending.pop())
        pending += below[node][::-1]
    after, open_places = [len(nodes)] * len(nodes), list[int]()
    for place, node in enumerate(nodes):
        while open_places and nodes[open_places[-1]] is not node.parent:
            after[open_places.pop()] = place
        open_places.append(place)
    return nodes, after
