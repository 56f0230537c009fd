"""Rollout on one core: the native engine, transformers' `generate` in batches, and vLLM's CPU build, same prompts and lengths.

SmolLM2-135M-Instruct in float32, one thread a process, CPU seconds, end of sequence off. vLLM runs in an environment of its
own (`make test-vllm` makes it); where there is none, its rows are missing. One of each takes a quarter of an hour.
Run: OMP_NUM_THREADS=1 python benchmarks/bench_rollout.py [--quick] [--lora] [--repeats N]
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
    VLLM,
    VLLM_PYTHON,
    Groups,
    Pipeline,
    alternating,
    random_tokens,
    saved,
    varied_lengths,
)

from mas_hpc.config import AdapterConfig, ModelConfig
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.load import load_model
from mas_hpc.rollout.native.engine import NativeEngine

HF = f"transformers {transformers.__version__} generate"
AGENTS = ("solver", "critic", "reviser", "verifier")
TARGETS = AdapterConfig().target_modules


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
    parser.add_argument("--lora", action="store_true", help="vLLM with an adapter an agent too: a quarter of an hour more")
    parser.add_argument("--repeats", type=int, default=3, help="of each side, in turn; medians")
    words = parser.parse_args()
    quick = words.quick
    torch.set_num_threads(1)
    repeats = 1 if quick else words.repeats
    groups, pipeline = workloads(quick)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model, tokenizer = load_model(ModelConfig(path="smollm2"), seed=0)
        folder, peer = saved(model, tokenizer, Path(scratch))
        rows = group_rows(groups, model, tokenizer, peer, folder, repeats)
        rows += pipeline_rows(pipeline, model, tokenizer, peer, folder, repeats, with_vllm=words.lora)
    notes = {
        "model": "SmolLM2-135M-Instruct, float32, one thread, temperature 1, end of sequence off, forced lengths",
        "repeats": f"{repeats}, in turn; medians",
        "transformers": "left-padded batches of 32, each as long as its longest completion",
        "vllm": "its own process, compiled, with adapters eager; prefix caching on",
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
        job = {"model": str(folder), "max_rows": 64, "eager": False, "cases": [groups.case("groups")] * repeats}
        with VLLM() as vllm:
            answer = vllm.ask(job)
        name = f"vllm {answer['versions']['vllm']}"
        costs = [one["cpu_s"] for one in answer["cases"]]
        rows.append(cost_row(case=case, metric="cpu_s", ours=median(ours), peer=name, theirs=median(costs), target=1.0))
    return rows


def pipeline_rows(
    pipeline: Pipeline, model: Any, tokenizer: Any, peer: Any, folder: Path, repeats: int, *, with_vllm: bool
) -> list[Row]:  # fmt: skip
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
    if with_vllm and VLLM_PYTHON.exists():
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
        with VLLM() as vllm:
            answer = vllm.ask(job)
        whole = sum(one["cpu_s"] for one in answer["cases"])
        name = f"vllm {answer['versions']['vllm']}, LoRA, eager, once"
        rows.append(cost_row(case=case, metric="cpu_s", ours=median(ours), peer=name, theirs=whole, target=0.0))
    return rows


if __name__ == "__main__":
    main()
