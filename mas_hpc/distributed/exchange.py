"""Text between ranks, over their group of gloo: records travel as JSON lines, never as pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from mas_hpc.distributed.world import World


def gather_lines(world: World, lines: Sequence[str]) -> list[str]:
    """All ranks' lines, rank 0's first, on every rank. Lines must not contain line breaks."""
    if world.size == 1:
        return list(lines)
    data = torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=world.control)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world.size)]
    dist.all_gather(received, padded, group=world.control)
    texts = [bytes(block[: int(size)].tolist()).decode() for block, size in zip(received, sizes, strict=True)]
    return [line for text in texts for line in text.split("\n") if line]


def gather_values(world: World, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
    """All ranks' named numbers, rank 0's first; a rank without work has fewer names. Collective."""
    return [json.loads(line) for line in gather_lines(world, [json.dumps(values)])]


def first_says(world: World, value: bool) -> bool:
    """What the first rank says, on every rank. Collective."""
    said = torch.tensor([value])
    if world.size > 1:
        dist.broadcast(said, src=0, group=world.control)
    return bool(said)


def most(world: World, count: int) -> int:
    """The largest of the ranks' counts. Collective."""
    counts = torch.tensor([count])
    if world.size > 1:
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=world.control)
    return int(counts)
