"""Ranks that train every case with some strategies; each run goes to <folder>/<strategy>/<case>, weights and metrics.

Run: torchrun ... strategy_ranks.py <folder> <model to start from> <strategy>,<strategy>,... <case>,<case>,...
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World, connected
from mas_hpc.phases.training import train, warm_up
from mas_hpc.resume import Training
from mas_hpc.run import build

CONFIGS = Path(__file__).parents[2] / "configs"
STRATEGIES = {
    "ddp": ("distributed.strategy=ddp",),
    "fsdp2": ("distributed.strategy=fsdp2",),
    "fsdp2_parts": ("distributed.strategy=fsdp2",),
    "hsdp_2x1": ("distributed.strategy=fsdp2", "distributed.shard_size=1"),
    "tensor": ("distributed.tensor_parallel=2",),
    "tensor_parts": ("distributed.tensor_parallel=2",),
    "tensor_fsdp2": ("distributed.tensor_parallel=2", "distributed.strategy=fsdp2"),
    "tensor_fsdp2_parts": ("distributed.tensor_parallel=2", "distributed.strategy=fsdp2"),
    "tensor_hsdp_2x1": ("distributed.tensor_parallel=2", "distributed.strategy=fsdp2", "distributed.shard_size=1"),
    "tensor_fsdp2_bfloat16": (
        "distributed.tensor_parallel=2",
        "distributed.strategy=fsdp2",
        "distributed.compute_dtype=bfloat16",
    ),
    "tensor_fsdp2_offload": ("distributed.tensor_parallel=2", "distributed.strategy=fsdp2", "distributed.offload=true"),
    "fsdp2_bfloat16": ("distributed.strategy=fsdp2", "distributed.compute_dtype=bfloat16"),
    "fsdp2_parts_bfloat16": ("distributed.strategy=fsdp2", "distributed.compute_dtype=bfloat16"),
    "fsdp2_parts_offload": ("distributed.strategy=fsdp2", "distributed.offload=true"),
    "fsdp2_offload": ("distributed.strategy=fsdp2", "distributed.offload=true"),
    "zero1": ("distributed.strategy=zero1",),
    "zero2": ("distributed.strategy=zero2",),
    "zero3": ("distributed.strategy=zero3",),
    "zero2_offload": ("distributed.strategy=zero2", "distributed.offload=true"),
    "zero3_offload": ("distributed.strategy=zero3", "distributed.offload=true"),
}
PARTS = ("fsdp2_parts", "fsdp2_parts_bfloat16", "fsdp2_parts_offload", "tensor_parts", "tensor_fsdp2_parts")
"""Strategies under which ranks read their parts of the weights from files, where others load the whole model first."""
SMALL = (
    "model.hidden_size=32", "method.steps=3", "method.weight_decay=0.1", "data.num_train=16", "data.num_test=4",
    "data.num_digits=3", "evaluation.num_tasks=4",
)  # fmt: skip
SFT = ("method.batch_size=5",)  # one rank has more of it than the other
DPO = ("method.batch_size=6",)
AT_GRPO = ("method.tasks_per_step=8", "method.group_size=4", "method.eval_every=0")
PPO = ("method.tasks_per_step=8", "method.critic_warmup_steps=1", "method.minibatches=1", "method.eval_every=0")
ONE_PASS, MANY_PASSES = "model.max_tree_tokens=100000", "model.max_tree_tokens=100"
ADAPTERS = ("adapters.policies=per_agent", "adapters.rank=4")
CASES = {
    "first": ("sft", "method.steps=150", "method.batch_size=8", "method.learning_rate=0.01", "method.warmup_steps=5"),
    "sft": ("sft", *SFT, ONE_PASS),
    "sft_passes": ("sft", *SFT, MANY_PASSES, "model.activation_checkpointing=true"),
    "sft_one_rank": ("sft", "method.batch_size=1", ONE_PASS),
    "sft_adapters": ("sft", *SFT, MANY_PASSES, *ADAPTERS),
    "rm": ("rm", *DPO, "method.eval_every=2", MANY_PASSES),
    "rm_adapters": ("rm", *DPO, MANY_PASSES, *ADAPTERS),
    "dpo": ("dpo", *DPO, ONE_PASS),
    "dpo_passes": ("dpo", *DPO, MANY_PASSES),
    "kto": ("dpo", *DPO, MANY_PASSES, "method.losses={kto: 1.0}"),
    "at_grpo": ("at_grpo", *AT_GRPO, ONE_PASS, "method.kl.coefficient=0.1"),
    "at_grpo_passes": ("at_grpo", *AT_GRPO, MANY_PASSES),
    "at_grpo_adapters": ("at_grpo", *AT_GRPO, MANY_PASSES, *ADAPTERS, "method.kl.coefficient=0.1"),
    "ppo": ("ppo", *PPO, MANY_PASSES),
    "sft_untied": ("sft", *SFT, MANY_PASSES),
    "rm_untied": ("rm", *DPO, MANY_PASSES),
    "sft_qwen3": ("sft", *SFT, MANY_PASSES),
    "dpo_qwen3": ("dpo", *DPO, MANY_PASSES),
    "sft_adapters_qwen3": ("sft", *SFT, MANY_PASSES, *ADAPTERS, "adapters.target_modules=[q_proj, v_proj, o_proj, down_proj]"),
    "sft_biased": ("sft", *SFT, MANY_PASSES, "model.activation_checkpointing=true"),
    "sft_noise": ("sft", *SFT, ONE_PASS, "method.neftune_alpha=5"),
    "sft_adafactor": ("sft", *SFT, MANY_PASSES, "method.optimizer=adafactor"),
    "sft_bfloat16": ("sft", *SFT, MANY_PASSES, "model.dtype=bfloat16"),
    "rm_bfloat16": ("rm", *DPO, MANY_PASSES, "model.dtype=bfloat16"),
    "at_grpo_adapters_bfloat16": ("at_grpo", *AT_GRPO, MANY_PASSES, *ADAPTERS, "model.dtype=bfloat16"),
}  # fmt: skip
"""Configuration and overrides by the name of a case; the others go on from the first, whose answers differ in their rewards;
those named after a kind of model from one of OTHERS beside it."""
OTHERS = ("untied", "qwen3", "biased")
"""untied: an LM head of its own; qwen3: norms of heads, which share keys, and an odd vocabulary; biased: biases everywhere."""


def main() -> None:
    folder, model, strategies, cases = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4].split(",")
    with connected(World.from_env()) as world:
        for strategy in strategies:
            for case in cases:
                config, *own = CASES[case]
                other = next((name for name in OTHERS if name in case), None)
                start = "tiny" if case == "first" else Path(model).with_name(other) if other else model
                where = (f"runs_dir={folder}/{strategy}", f"name={case}", f"model.path={start}", "warm_start=null")
                settings = load_config(CONFIGS / f"{config}.yaml", [*SMALL, *own, *STRATEGIES[strategy], *where])
                in_parts = strategy in PARTS
                job = Training(job="train") if in_parts else None
                run = build(settings, world, Console(quiet=True), training=job)
                assert (run.source is not None) == in_parts
                train(warm_up(run))
                run.close()


if __name__ == "__main__":
    main()
