"""Text between ranks: records travel as JSON lines, never as pickles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mas_hpc.distributed.world import World


def gather_lines(world: World, lines: Sequence[str]) -> list[str]:
    """All ranks' lines, rank 0's first, on every rank. Lines must not contain line breaks."""
    if world.size == 1:
        return list(lines)
    data = torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world.size)]
    dist.all_gather(received, padded)
    texts = [bytes(block[: int(size)].tolist()).decode() for block, size in zip(received, sizes, strict=True)]
    return [line for text in texts for line in text.split("\n") if line]
