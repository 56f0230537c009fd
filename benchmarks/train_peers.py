"""One measurement of TRL's trainers in this process: what bench_train.py runs beside us, and nothing of ours.

Every argument that differs from TRL's default is one that the comparison needs: fp32 on the CPU, no recomputed
activations (TRL recomputes them by default, which is slower), the data in order, a constant learning rate, no weight decay
and no files.
"""

from __future__ import annotations

import time
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

Record = dict[str, Any]


class Clock(TrainerCallback):
    """CPU seconds of each optimizer step, its data loading and logging included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())


def measure(case: str, workload: Record, model_folder: str, scratch: str) -> Record:
    """Run the workload's steps; return CPU seconds and loss of each step and TRL's other metrics of the first."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    build = {"sft": sft_trainer, "sft-packed": packed_sft_trainer, "dpo": dpo_trainer, "grpo": grpo_trainer}[case]
    trainer = build(workload, load(model_folder), tokenizer, scratch)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)]
    return {"cpu_s": steps, "losses": [entry["loss"] for entry in logs], "first": logs[0]}


def load(model_folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")


def common(workload: Record, scratch: str) -> Record:
    """Arguments of all three trainers."""
    return {
        "output_dir": scratch, "max_steps": workload["num_steps"], "learning_rate": workload["learning_rate"],
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch_fused",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 0,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def sft_trainer(workload: Record, model: Any, tokenizer: Any, scratch: str, **extra: Any) -> SFTTrainer:
    arguments = SFTConfig(
        per_device_train_batch_size=workload["batch"], completion_only_loss=True, train_sampling_strategy="sequential",
        **common(workload, scratch), **extra,
    )  # fmt: skip
    data = Dataset.from_list(workload["conversations"])
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def packed_sft_trainer(workload: Record, model: Any, tokenizer: Any, scratch: str) -> SFTTrainer:
    """Without padding: the batch is one row with position ids, for which TRL asks for flash attention."""
    return sft_trainer(workload, model, tokenizer, scratch, padding_free=True, max_length=None)


def dpo_trainer(workload: Record, model: Any, tokenizer: Any, scratch: str) -> DPOTrainer:
    """The reference model is a frozen copy that runs in the step."""
    arguments = DPOConfig(
        per_device_train_batch_size=workload["batch"], beta=workload["beta"], train_sampling_strategy="sequential",
        **common(workload, scratch),
    )  # fmt: skip
    data = Dataset.from_list(workload["pairs"])
    reference = load(model.name_or_path)
    return DPOTrainer(model=model, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer)


def grpo_trainer(workload: Record, model: Any, tokenizer: Any, scratch: str) -> GRPOTrainer:
    """All completions are sampled in one batch by transformers; eos is suppressed, so that none ends early."""
    length, rows = workload["completion"], len(workload["prompts"]) * workload["group"]
    micro_batches = workload["micro_batches"]
    arguments = GRPOConfig(
        per_device_train_batch_size=rows // micro_batches, gradient_accumulation_steps=micro_batches,
        num_generations=workload["group"], max_completion_length=length, generation_kwargs={"min_new_tokens": length},
        beta=0.0, num_iterations=1, shuffle_dataset=False, temperature=1.0, loss_type="dapo",
        **common(workload, scratch),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": prompt} for prompt in workload["prompts"]])
    return GRPOTrainer(
        model=model, args=arguments, reward_funcs=workload["reward"], train_dataset=data, processing_class=tokenizer
    )
