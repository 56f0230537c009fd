"""The strategy that a configuration names."""

from __future__ import annotations

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.strategy import Strategy
from mas_hpc.distributed.world import World


def build_strategy(world: World, settings: DistributedConfig) -> Strategy:
    """Raises ConfigError for shard_size or tensor_parallel that do not fit the ranks, LaunchError when DeepSpeed is missing.

    One rank has nothing to share: whatever is named, it trains alone.
    """
    if world.size > 1 and settings.tensor_parallel > 1:
        from mas_hpc.distributed.tensor_parallel import TensorParallel

        return TensorParallel(world, settings)
    if world.size == 1 or settings.strategy == "ddp":
        return DataParallel(world, compute_dtype=settings.compute_dtype)
    if settings.strategy == "fsdp2":
        from mas_hpc.distributed.fsdp2 import FullySharded

        return FullySharded(world, settings)
    from mas_hpc.distributed.deepspeed import Zero

    return Zero(world, settings)
