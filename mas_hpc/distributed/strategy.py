"""What a distribution strategy does for the learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch.nn import Parameter

from mas_hpc.distributed.world import World


class Strategy(Protocol):
    """Losses are already divided by global counts, so gradients are summed over ranks, never averaged."""

    world: World

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace every gradient by its sum over ranks; a missing one counts as zero, unless all ranks miss it. Collective."""
        ...

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """All ranks' named numbers, rank 0's first; a rank without work has fewer names. Collective."""
        ...
