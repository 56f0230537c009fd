"""The tree of tokens whose keys and values are held: who shares what, who reads what, and what goes when room is needed.

A radix tree: a node is an unbranched run of tokens, and a path from the root is a prefix of prompts or transcripts. Two
tokens are one iff token, adapter and the whole path above are equal. No tensors here: a token's keys and values lie in
the slot of a pool that its node names. Legend: N tokens of a node, T tokens of a path.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mas_hpc.prefix_tree import IntArray

ADAPTER_BITS = 16
EVICTED_SHARE = 16
"""Room is made for at least one part in so many of all slots: the search for old leaves costs as much for one as for many."""


def path_keys(token_ids: Sequence[int], adapters: Sequence[int]) -> IntArray:
    """Token and adapter (-1: the base model) as one number a token."""
    return (np.asarray(token_ids, dtype=np.int64) << ADAPTER_BITS) + np.asarray(adapters, dtype=np.int64) + 1


def tokens_of(key_T: IntArray) -> IntArray:
    """The token ids of `path_keys`."""
    return key_T >> ADAPTER_BITS


def adapters_of(key_T: IntArray) -> IntArray:
    """The adapters of `path_keys`."""
    return (key_T & ((1 << ADAPTER_BITS) - 1)) - 1


@dataclass(slots=True, eq=False)
class Node:
    """An unbranched run of tokens. Equal only to itself; a node that is cut stays the lower part, so that handles hold."""

    key_N: IntArray
    slot_N: IntArray
    """Where in the pool."""
    parent: Node | None
    depth: int
    """Tokens above."""
    filled: int = 0
    """How many of its first tokens have their keys and values."""
    pins: int = 0
    """Paths in use that pass through: pinned nodes stay."""
    used: int = 0
    """When it was last read, on the tree's own clock."""
    children: dict[int, Node] = field(default_factory=dict)
    """By the first key."""

    def __len__(self) -> int:
        return len(self.key_N)

    @property
    def end(self) -> int:
        """Tokens of the path down to and with this node."""
        return self.depth + len(self.key_N)

    def path(self) -> list[Node]:
        """The nodes from the first token down to this one."""
        nodes = [self]
        while (above := nodes[-1].parent) is not None and above.parent is not None:
            nodes.append(above)
        return nodes[::-1]

    def slots(self) -> IntArray:
        """The slots of all tokens of the path, [T]."""
        return np.concatenate([node.slot_N for node in self.path()])


class KVTree:
    """At most `capacity` slots in nodes; `evicted` counts those that were given up for others.

    Example: tree = KVTree(100); leaf = tree.insert(path_keys([1, 2], [-1, -1])); tree.pin(leaf)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        """Slots in nodes."""
        self.evicted = 0
        self._clock = 0
        self._free: list[int] = []
        self._fresh = 0
        self.root = Node(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), None, 0)

    def hold(self, key_T: IntArray, spare: int) -> Node | None:
        """Insert and pin the path; None when that does not leave `spare` free slots beside it, whatever is evicted."""
        node, place = self._walk(self.root, key_T)
        known = node.depth + place
        prefix = self.insert(key_T[:known]) if known else None
        if prefix:
            self.pin(prefix)
        leaf = None
        if self.make_room(len(key_T) - known + spare):
            leaf = self.insert(key_T[known:], below=prefix)
            self.pin(leaf)
        if prefix:
            self.unpin(prefix)
        return leaf

    def insert(self, key_T: IntArray, *, below: Node | None = None) -> Node:
        """The node that ends the path (continuing `below`'s), made where it is missing; the caller has seen to the room.

        New nodes have nothing filled.
        """
        start = below or self.root
        node, place = self._walk(start, key_T)
        done = node.depth + place - start.end
        if place < len(node):
            node = self._cut(node, place)
        if done < len(key_T):
            rest = key_T[done:]
            child = Node(rest, self._allocate(len(rest)), node, node.end)
            node.children[int(rest[0])] = child
            node = child
        self._touch(node)
        return node

    def fill(self, key_T: IntArray, *, below: Node) -> list[tuple[int, int]]:
        """Insert a path and mark it filled; which of its tokens the caller has to write, and into which slots."""
        leaf = self.insert(key_T, below=below)
        missing: list[tuple[int, int]] = []
        for node in leaf.path():
            if node.depth >= below.end:
                places = range(node.filled, len(node))
                missing += [(node.depth - below.end + i, int(node.slot_N[i])) for i in places]
                node.filled = len(node)
        return missing

    def pin(self, node: Node) -> None:
        """Keep the path down to this node until it is unpinned as often."""
        for above in node.path():
            above.pins += 1
        self._touch(node)

    def unpin(self, node: Node) -> None:
        """Take back one `pin`."""
        for above in node.path():
            above.pins -= 1
            assert above.pins >= 0

    def make_room(self, count: int) -> bool:
        """Evict what nobody has pinned, the longest unread first, until `count` slots are free.

        Returns whether they are; where that cannot be, nothing is evicted.
        """
        wanted = count - (self.capacity - self.used)
        if wanted <= 0:
            return True
        idle = [node for node in self._nodes() if not node.pins]
        if wanted > sum(map(len, idle)):
            return False
        wanted = max(wanted, min(self.capacity // EVICTED_SHARE, self.used))
        number = itertools.count()  # of equally old ones the first that was found: ranks that share layers evict alike
        leaves = [(node.used, next(number), node) for node in idle if not node.children]
        heapq.heapify(leaves)
        gone = 0
        while leaves and gone < wanted:
            _, _, node = heapq.heappop(leaves)
            gone += len(node)
            self._remove(node)
            above = node.parent
            if above is not self.root and above is not None and not above.children and not above.pins:
                heapq.heappush(leaves, (above.used, next(number), above))
        self.evicted += gone
        return True

    def _walk(self, start: Node, key_T: IntArray) -> tuple[Node, int]:
        """The last node that the path reaches from the end of `start`, and how many of its tokens belong to the path."""
        node, place, done = start, len(start), 0
        while done < len(key_T) and (child := node.children.get(int(key_T[done]))) is not None:
            node, length = child, min(len(child), len(key_T) - done)
            differs = np.flatnonzero(child.key_N[:length] != key_T[done : done + length])
            place = int(differs[0]) if len(differs) else length
            done += place
            if place < len(child):
                break
        return node, place

    def _cut(self, node: Node, place: int) -> Node:
        """Put a node of its own for the first `place` tokens above the rest; return it."""
        assert node.parent is not None
        upper = Node(
            node.key_N[:place], node.slot_N[:place], node.parent, node.depth, min(node.filled, place), node.pins, node.used
        )
        node.parent.children[int(node.key_N[0])] = upper
        node.key_N, node.slot_N, node.parent = node.key_N[place:], node.slot_N[place:], upper
        node.depth, node.filled = upper.end, max(0, node.filled - place)
        upper.children[int(node.key_N[0])] = node
        return upper

    def _allocate(self, count: int) -> IntArray:
        assert self.used + count <= self.capacity, "no room was made"
        again = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = np.arange(self._fresh, self._fresh + count - len(again))
        self._fresh += len(fresh)
        self.used += count
        return np.concatenate([np.array(again, dtype=np.int64), fresh])

    def _remove(self, node: Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[int(node.key_N[0])]
        self._free += node.slot_N.tolist()
        self.used -= len(node)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        for above in node.path():
            above.used = self._clock

    def _nodes(self) -> Iterator[Node]:
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            pending += node.children.values()
            yield node
