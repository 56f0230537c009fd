"""How tensors lie in the ring buffer through which they are streamed: both sides make the same plan from the specs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mas_hpc.distributed.weight_source import TensorSpec

ALIGNMENT = 64
"""Bytes: a cache line, and a multiple of every element size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive tensors that travel together, as one piece of the ring.

    Example: Block(start=0, size=4096, tensors=((0, norm), (2304, bias)), needs=0)
    """

    start: int
    size: int
    """Bytes."""
    tensors: tuple[tuple[int, TensorSpec], ...]
    """Each with its offset in the block."""
    needs: int
    """How many of the first blocks must have left the ring before this one enters."""

    def bytes_in(self, ring: Tensor) -> Tensor:
        """The block's part of the ring, uint8."""
        return ring[self.start : self.start + self.size]

    def views(self, ring: Tensor) -> list[tuple[TensorSpec, Tensor]]:
        """The block's tensors, as views into the ring."""
        inside = self.bytes_in(ring)
        return [
            (spec, inside[offset : offset + spec.num_bytes].view(spec.torch_dtype).view(spec.shape))
            for offset, spec in self.tensors
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Blocks in the order in which they travel, and the ring that they need.

    Example: Plan(blocks=(Block(...),), ring_bytes=4096)
    """

    blocks: tuple[Block, ...]
    ring_bytes: int


def plan(specs: Sequence[TensorSpec], *, block_bytes: int, ahead_bytes: int) -> Plan:
    """Group tensors into blocks of at most `block_bytes` (a larger tensor is a block of its own).

    The ring holds the largest block and `ahead_bytes` more, so that one side fills while the other reads.
    """
    contents: list[list[tuple[int, TensorSpec]]] = []
    sizes: list[int] = []
    for spec in specs:
        size = -(-spec.num_bytes // ALIGNMENT) * ALIGNMENT
        if not contents or sizes[-1] + size > block_bytes:
            contents.append([])
            sizes.append(0)
        contents[-1].append((sizes[-1], spec))
        sizes[-1] += size
    ring_bytes = max(sizes, default=0) + ahead_bytes
    starts, cursor = [], 0
    for size in sizes:
        cursor = 0 if cursor + size > ring_bytes else cursor
        starts.append(cursor)
        cursor += size
    blocks = [
        Block(start=start, size=size, tensors=tuple(inside), needs=_needs(starts, sizes, number))
        for number, (start, size, inside) in enumerate(zip(starts, sizes, contents, strict=True))
    ]
    return Plan(blocks=tuple(blocks), ring_bytes=ring_bytes)


def _needs(starts: Sequence[int], sizes: Sequence[int], number: int) -> int:
    """One more than the last earlier block that lies where block `number` will."""
    end = starts[number] + sizes[number]
    for earlier in reversed(range(number)):
        if starts[earlier] < end and starts[number] < starts[earlier] + sizes[earlier]:
            return earlier + 1
    return 0
