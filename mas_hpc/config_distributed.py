"""The page's sections on ranks: how weights are spread over them, what is kept of a run, and what is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mas_hpc.config_methods import Count, Positive, PositiveFloat, Section


class DistributedConfig(Section):
    """How training, and a model that serves, are spread over ranks; the trajectory is the same."""

    device: Literal["auto", "cpu", "cuda", "xpu"] = "auto"
    """What models run on; auto: xpu, cuda or cpu, the first that there is. `mas-hpc env` says which, and why."""
    strategy: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = "ddp"
    """ddp: whole weights on every rank; fsdp2: shards of everything (torch); zero1 to zero3: DeepSpeed (extra: deepspeed)."""
    tensor_parallel: Positive = 1
    """ddp, fsdp2: neighbouring ranks, such as a card's 2 tiles, that train, and with rollout.engine=native serve, each layer
    together."""
    shard_size: Count = 0
    """fsdp2: ranks that share one copy of the weights (HSDP); 0: all ranks."""
    compute_dtype: Literal["same", "bfloat16"] = "same"
    """fsdp2: type of a pass, where the weights and the optimizer keep model.dtype; gradients are reduced in float32."""
    offload: bool = False
    """fsdp2, zero: keep shards and optimizer states in the memory of the host."""
    deepspeed: str = ""
    """zero: file of DeepSpeed's settings, such as configs/deepspeed/zero3.json; empty: those of the strategy."""
    hang_s: PositiveFloat = 1500.0
    """Ranks of which none has got anywhere for so long write their stacks and end; above the longest save or load."""

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> DistributedConfig:
        sharded, zero = self.strategy == "fsdp2", self.strategy.startswith("zero")
        idle = {
            "tensor_parallel": self.tensor_parallel > 1 and zero,
            "shard_size": bool(self.shard_size) and not sharded,
            "compute_dtype": self.compute_dtype != "same" and not sharded,
            "offload": self.offload and not (sharded or zero),
            "deepspeed": bool(self.deepspeed) and not zero,
        }
        for key in (key for key, is_idle in idle.items() if is_idle):
            value = getattr(self, key)
            raise ValueError(f"distributed.{key}={value}: distributed.strategy={self.strategy} does not read it; leave it out")
        return self


class CheckpointConfig(Section):
    """What a run keeps so that it can go on after it was stopped."""

    every: Count = 0
    """Optimizer steps, or batches of rollouts, between two checkpoints; 0: none."""
    keep_last: Positive = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the one with the best held-out metric too, where method.eval_every looks at one."""
    asynchronous: bool = True
    """Write while training goes on."""


class KernelsConfig(Section):
    """What computes log-probabilities and entropies from hidden states, and their gradients."""

    backend: Literal["auto", "torch", "triton", "sycl"] = "auto"
    """auto: triton on cuda and xpu (else sycl on xpu, else torch), torch on a cpu; a named one that cannot run is an error."""


class ProfileConfig(Section):
    """Traces of torch's profiler. With any, the parts of all steps wait for the device, and a traced step takes longer."""

    first: Count = 3
    """First step of method that is traced, counted from 0; earlier ones are slower, as they warm up."""
    count: Count = 0
    """Steps that are traced, each into profile/rank_<r>_step_<n>.json.gz of the run folder; 0: none."""
