"""DeepSpeed's settings: ours by default, or the file that distributed.deepspeed names, without what the run itself decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.errors import ConfigError

BUCKET_ELEMENTS = 16 << 20
"""Of a reduction or a gathering: 64 MiB in float32."""
PERSISTENT_ELEMENTS = 10_000
"""Up to so many, ZeRO-3 keeps a parameter whole on every rank: norms and biases."""
MAX_LIVE_ELEMENTS = 1 << 30
"""Of gathered parameters at a time, in ZeRO-3."""

OURS = {
    "train_batch_size": "method.batch_size, or method.tasks_per_step",
    "train_micro_batch_size_per_gpu": "model.max_tree_tokens",
    "gradient_accumulation_steps": "model.max_tree_tokens",
    "managed_gradient_accumulation": "model.max_tree_tokens",
    "gradient_clipping": "method.max_grad_norm",
    "gradient_allreduce_op": "nothing: gradients are summed, losses have global denominators",
    "optimizer": "method.optimizer",
    "scheduler": "method.decay",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "zero_allow_untested_optimizer": "method.optimizer",
    "zero_force_ds_cpu_optimizer": "method.optimizer",
}
"""Keys that a file may not have, and what decides in their place."""


def built_in(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """The settings of a ZeRO stage (arXiv 1910.02054), as configs/deepspeed holds them. `offload`: arXiv 2101.06840."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": False}
    if stage < 3:
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    else:
        zero["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        zero["stage3_max_live_parameters"] = MAX_LIVE_ELEMENTS
        zero["stage3_max_reuse_distance"] = MAX_LIVE_ELEMENTS
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {"zero_optimization": zero}


def stage_of(settings: DistributedConfig) -> int:
    """1 to 3: how much is spread over the ranks: optimizer states, gradients too, weights too."""
    return int(settings.strategy.removeprefix("zero"))


def read_settings(settings: DistributedConfig) -> dict[str, Any]:
    """The file's settings, or the built-in ones of the stage.

    Raises ConfigError for a file that cannot be read, is of another stage, or decides what other keys decide.
    """
    stage = stage_of(settings)
    if not settings.deepspeed:
        return built_in(stage, offload=settings.offload)
    name = f"distributed.deepspeed={settings.deepspeed!r}"
    try:
        found = json.loads(Path(settings.deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: no JSON that can be read ({error}); start from one of configs/deepspeed") from None
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise ConfigError(f"{name}: expected an object with zero_optimization; start from one of configs/deepspeed")
    if decided := sorted(OURS.keys() & found.keys()):
        told = ", ".join(f"{key} (decided by {OURS[key]})" for key in decided)
        raise ConfigError(f"{name}: {told}; take it out of the file")
    if (its := found["zero_optimization"].get("stage")) != stage:
        raise ConfigError(
            f"{name}: zero_optimization.stage={its!r}, but distributed.strategy={settings.strategy}; give both the same stage"
        )
    if settings.offload:
        raise ConfigError(
            f"{name}: the file says where optimizer states and weights are kept (zero_optimization.offload_optimizer, "
            "offload_param); set distributed.offload=false"
        )
    return found


def engine_settings(found: dict[str, Any], *, is_bfloat16: bool) -> dict[str, Any]:
    """What DeepSpeed is given: `found`, and what the run decides.

    A batch is one pass: how many passes make a step, it is told at each. Gradients of bfloat16 weights are summed, and
    added up over passes, in float32.
    """
    zero = dict(found["zero_optimization"])
    if zero["stage"] < 3 and "offload_optimizer" not in zero:
        zero["compute_grad_norm"] = False  # clip has done it
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # 1 would be the default
        "zero_force_ds_cpu_optimizer": False,  # it is compiled for minutes where the job runs
        "zero_optimization": zero,
    }
    if is_bfloat16:
        ours |= {"bf16": {"enabled": True}, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return {**found, **ours}
