"""Rollout on one core: the native engine, transformers' `generate` in batches, and vLLM's CPU build, same prompts and lengths.

SmolLM2-135M-Instruct in float32, one thread a process, CPU seconds, end of sequence off. vLLM runs in an environment of its
own (`make test-vllm` makes it); where there is none, its rows are missing. Takes about half an hour on a quiet core.
Run: OMP_NUM_THREADS=1 python -m benchmarks.bench_rollout [--quick]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import PeftModel
from reporting import Row, cost_row, cpu_seconds, report
from rollout_peers import (
    VLLM_PYTHON,
    Groups,
    Pipeline,
    alternating,
    decode_ours,
    decode_theirs,
    hardware,
    random_tokens,
    varied_lengths,
    vllm,
)
from transformers import AutoModelForCausalLM

from mas_hpc.config import AdapterConfig, ModelConfig
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.load import load_model
from mas_hpc.rollout.native.engine import NativeEngine

HF = f"transformers {transformers.__version__} generate"
AGENTS = ("solver", "critic", "reviser", "verifier")
TARGETS = AdapterConfig().target_modules
REPEATS = 3


def workloads(quick: bool) -> tuple[Groups, Pipeline]:
    """The two workloads that the targets are about; `quick` has the same form and a tenth of the work."""
    questions, samples, prompt, mean, cap = (2, 4, 60, 8, 16) if quick else (8, 8, 300, 40, 128)
    groups = Groups(
        prompts=random_tokens(questions, prompt, seed=1), samples=samples,
        new_tokens=varied_lengths(questions * samples, mean=mean, cap=cap, seed=2),
    )  # fmt: skip
    lengths = iter(varied_lengths(len(AGENTS) * questions * 4, mean=mean, cap=cap, seed=3))
    pipeline = Pipeline(
        questions=random_tokens(questions, prompt // 2, seed=4), agents=AGENTS, siblings=4, cue=16,
        new_tokens=[[[next(lengths) for _ in range(4)] for _ in range(questions)] for _ in AGENTS],
    )  # fmt: skip
    return groups, pipeline


def main() -> None:
    """Measure, write results/rollout.json, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, once: to see that it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    repeats = 1 if quick else REPEATS
    groups, pipeline = workloads(quick)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model, tokenizer = load_model(ModelConfig(path="smollm2"), seed=0)
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = None, 0
        rows = group_rows(groups, model, tokenizer, peer, folder, repeats)
        rows += decode_rows(model, tokenizer, peer, folder, repeats, *((60, 4) if quick else (300, 24)))
        rows += pipeline_rows(pipeline, model, tokenizer, peer, folder, repeats)
    notes = {
        "model": "SmolLM2-135M-Instruct, float32, one thread, temperature 1, end of sequence off, forced lengths",
        "transformers": "left-padded batches of 32, each as long as its longest completion",
        "vllm": "its own process, eager and, for decoding without adapters, compiled; prefix caching on",
        "pipeline": "4 agents, K=4 siblings a state, cue 16; ours: speaker scope, one engine; theirs: an adapter each in turn",
    }
    report("rollout-quick" if quick else "rollout", rows, notes=notes)


def group_rows(groups: Groups, model: Any, tokenizer: Any, peer: Any, folder: Path, repeats: int) -> list[Row]:
    """Samples of shared prompts."""
    engine = NativeEngine(model, tokenizer, max_rows=64)
    case = f"{len(groups.prompts)} prompts x {groups.samples} samples, {sum(groups.new_tokens)} tokens"
    ours, theirs = alternating(
        [lambda: cpu_seconds(lambda: groups.ours(engine)), lambda: cpu_seconds(lambda: groups.theirs(peer))], repeats
    )
    rows = [cost_row(case=case, metric="cpu_s", ours=median(ours), peer=HF, theirs=median(theirs), target=4.0)]
    if VLLM_PYTHON.exists():
        answer = vllm({"model": str(folder), "max_rows": 64, "eager": False, "cases": [groups.case("groups")] * repeats})
        name = f"vllm {answer['versions']['vllm']}"
        costs = [one["cpu_s"] for one in answer["cases"]]
        rows.append(cost_row(case=case, metric="cpu_s", ours=median(ours), peer=name, theirs=median(costs), target=1.0))
    return rows


def decode_rows(model: Any, tokenizer: Any, peer: Any, folder: Path, repeats: int, context: int, steps: int) -> list[Row]:
    """A decoding step at batch 8 and 32, and its share of what the core could do."""
    engine = NativeEngine(model, tokenizer, max_rows=64)
    read, flops = hardware()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decode = {"batches": [8, 32] * repeats, "context": context, "steps": steps}
    answer = vllm({"model": str(folder), "eager": False, "decode": decode}) if VLLM_PYTHON.exists() else None
    rows = []
    for batch in (8, 32):
        measures = [
            lambda b=batch: decode_ours(engine, b, context, steps), lambda b=batch: decode_theirs(peer, b, context, steps)
        ]  # fmt: skip
        ours, theirs = map(median, alternating(measures, repeats))
        case = f"decode, batch {batch}, contexts of {context}"
        rows.append(cost_row(case=case, metric="cpu_s/step", ours=ours, peer=HF, theirs=theirs, target=0.9))
        if answer:
            fastest = median(one["cpu_s_per_step"] for one in answer["decode"] if one["batch"] == batch)
            name = f"vllm {answer['versions']['vllm']} compiled"
            rows.append(cost_row(case=case, metric="cpu_s/step", ours=ours, peer=name, theirs=fastest, target=0.9))
        cache = batch * context * 30 * 2 * 3 * 64 * 4
        bound = max((4 * parameters + cache) / read, 2 * parameters * batch / flops)
        name = f"roofline: {read / 1e9:.1f} GB/s, {flops / 1e9:.0f} GFLOP/s"
        rows.append(cost_row(case=case, metric="cpu_s/step", ours=ours, peer=name, theirs=bound, target=0.0))
    return rows


def pipeline_rows(pipeline: Pipeline, model: Any, tokenizer: Any, peer: Any, folder: Path, repeats: int) -> list[Row]:
    """A team whose agents have an adapter each and read one transcript."""
    model = copy.deepcopy(model)
    bank = AdapterBank.install(model, AGENTS, rank=8, alpha=16.0, target_modules=TARGETS, seed=0)
    adapters = {agent: folder.parent / agent for agent in AGENTS}
    for number, (agent, target) in enumerate(adapters.items()):
        torch.manual_seed(number)
        bank.assign(agent, {name: 0.02 * torch.randn_like(tensor) for name, tensor in bank.tensors(agent).items()})
        bank.export(agent, target, base_model=str(folder))
    engine = NativeEngine(model, tokenizer, bank=bank, scope="speaker", max_rows=64)
    adapted = PeftModel.from_pretrained(peer, adapters[AGENTS[0]], adapter_name=AGENTS[0])
    for agent in AGENTS[1:]:
        adapted.load_adapter(adapters[agent], adapter_name=agent)
    adapted.eval()
    stats, distinct = pipeline.ours(engine)
    ours, theirs = alternating(
        [lambda: cpu_seconds(lambda: pipeline.ours(engine)), lambda: cpu_seconds(lambda: pipeline.theirs(adapted))], repeats
    )
    case = f"{len(AGENTS)}-agent pipeline, {len(pipeline.questions)} questions, K={pipeline.siblings}, adapters"
    rows = [
        cost_row(case=case, metric="cpu_s", ours=median(ours), peer=f"{HF}, PEFT", theirs=median(theirs), target=3.5),
        cost_row(
            case=case, metric="prefilled tokens", ours=stats.prefilled_tokens, peer="distinct prompt tokens", theirs=distinct,
            target=1 / 1.3,
        ),
    ]  # fmt: skip
    if VLLM_PYTHON.exists():
        turns = [
            {
                "name": agent, "prompts": [prompt for prompt in prompts for _ in range(pipeline.siblings)],
                "new_tokens": [count for counts in lengths for count in counts],
                "adapters": [agent] * len(prompts) * pipeline.siblings, "fresh": number == 0,
            }
            for number, (agent, prompts, lengths) in enumerate(pipeline.turns())
        ]  # fmt: skip
        job = {
            "model": str(folder),
            "adapters": {agent: str(path) for agent, path in adapters.items()},
            "cases": turns * repeats,
        }
        answer = vllm(job)
        whole = sum(one["cpu_s"] for one in answer["cases"])
        name = f"vllm {answer['versions']['vllm']}, LoRA, eager, once"
        rows.append(cost_row(case=case, metric="cpu_s", ours=median(ours), peer=name, theirs=whole, target=0.0))
    return rows


if __name__ == "__main__":
    main()
