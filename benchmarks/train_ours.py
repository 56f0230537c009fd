"""One measurement of our trainers in this process: what bench_train.py runs beside TRL, on the same workload."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from mas_hpc.config import ModelConfig
from mas_hpc.config_methods import DPOConfig, GRPOConfig, SFTConfig
from mas_hpc.credit_assignment.group_relative import group_relative
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.models.load import load_model
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import offline_objective, policy_objective
from mas_hpc.training.network import Network
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample

Record = dict[str, Any]
Step = Callable[[int], dict[str, float]]


def measure(case: str, workload: Record, model_folder: str) -> Record:
    """Run the workload's steps; return CPU seconds and loss of each step and all metrics of the first."""
    step = {"sft": sft_steps, "dpo": dpo_steps, "grpo": grpo_steps}[case](workload, model_folder)
    cpu_s, metrics = [], []
    for number in range(workload["num_steps"]):
        start = time.process_time()
        metrics.append(step(number))
        cpu_s.append(time.process_time() - start)
    return {"cpu_s": cpu_s, "losses": [values["loss"] for values in metrics], "first": metrics[0]}


def network_of(model_folder: str) -> tuple[Network, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(ModelConfig(path=model_folder), seed=0)
    return Network(model=model), tokenizer


def schedule(workload: Record) -> dict[str, Any]:
    """AdamW as TRL's: constant rate, no decay."""
    return {
        "steps": workload["num_steps"], "learning_rate": workload["learning_rate"], "beta1": 0.9, "beta2": 0.999,
        "weight_decay": 0.0, "warmup_steps": 0, "decay_fraction": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip


def sft_steps(workload: Record, model_folder: str) -> Step:
    network, tokenizer = network_of(model_folder)
    method = SFTConfig(**schedule(workload))
    learner, objective = Learner(network, DataParallel(World()), method), offline_objective(method)
    samples = [document(tokenizer, number, row) for number, row in enumerate(workload["conversations"])]
    size = workload["batch"]

    def step(number: int) -> dict[str, float]:
        batch = samples[number * size : (number + 1) * size]
        return learner.update(batch, objective, Totals.of(batch))

    return step


def dpo_steps(workload: Record, model_folder: str) -> Step:
    """The reference model is a frozen copy that runs in the step, as TRL's."""
    (network, tokenizer), (reference, _) = network_of(model_folder), network_of(model_folder)
    reference.model.requires_grad_(False)
    method = DPOConfig(**schedule(workload), losses={"sigmoid": 1.0}, beta=workload["beta"])
    learner, objective = Learner(network, DataParallel(World()), method), offline_objective(method)
    samples = [sample for number, row in enumerate(workload["pairs"]) for sample in pair(tokenizer, number, row)]
    size = 2 * workload["batch"]

    def step(number: int) -> dict[str, float]:
        batch = samples[number * size : (number + 1) * size]
        batch = reference.annotate(batch, World(), column="reference_logprob", read="logprob")
        return learner.update(batch, objective, Totals.of(batch))

    return step


def grpo_steps(workload: Record, model_folder: str) -> Step:
    """Sample, reward, compare in the group, learn. No stop token is given, so that no completion ends early."""
    network, tokenizer = network_of(model_folder)
    group = workload["group"]
    method = GRPOConfig(**schedule(workload), group_size=group, loss="dapo", advantage="group")
    learner = Learner(network, DataParallel(World()), method)
    objective = policy_objective(method, kl_coefficient=0.0, max_length=workload["completion"])
    engine = NativeEngine(network.model, tokenizer, max_rows=group * len(workload["prompts"]))
    sampling = SamplingParams(max_new_tokens=workload["completion"])
    questions = [
        sample_of(f"{number}.{sibling}", number, token_ids(tokenizer, prompt), ())
        for number, prompt in enumerate(workload["prompts"])
        for sibling in range(group)
    ]

    def step(number: int) -> dict[str, float]:
        requests = [
            Request(
                prompt_ids=question.prompt_ids, prompt_spans=question.prompt_spans, policy="shared",
                seed=number * len(questions) + place, sampling=sampling,
            )
            for place, question in enumerate(questions)
        ]  # fmt: skip
        completions = engine.generate(requests)
        rewards = workload["reward"]([completion.text for completion in completions])
        advantages = group_relative(rewards, [question.tree for question in questions], baseline="mean", scale="group")
        batch = [
            replace(question, completion_ids=answer.token_ids, behavior_logprobs=answer.logprobs, advantage=advantage)
            for question, answer, advantage in zip(questions, completions, advantages, strict=True)
        ]
        return learner.update(batch, objective, Totals.of(batch))

    return step


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def document(tokenizer: PreTrainedTokenizerBase, number: int, row: Record) -> Sample:
    """A conversation of which the answer is trained on, the template's tokens around it included, as TRL does."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt, "the template renders the prompt alone differently"
    return sample_of(str(number), 0, prompt, whole[len(prompt) :])


def pair(tokenizer: PreTrainedTokenizerBase, number: int, row: Record) -> list[Sample]:
    """The chosen and the rejected sample; as in TRL the eos token ends both."""
    prompt = token_ids(tokenizer, row["prompt"])
    chosen, rejected = (token_ids(tokenizer, row[name] + str(tokenizer.eos_token)) for name in ("chosen", "rejected"))
    return [
        replace(sample_of(f"{number}+", number, prompt, chosen), label=1.0),
        replace(sample_of(f"{number}-", number, prompt, rejected), label=0.0),
    ]


def sample_of(name: str, tree: int, prompt: Sequence[int], completion: Sequence[int]) -> Sample:
    return Sample(
        id=name, tree=f"q{tree}", agent="", policy="shared", prompt_ids=tuple(prompt), prompt_spans=(("", len(prompt)),),
        completion_ids=tuple(completion),
    )  # fmt: skip
