"""The workloads of bench_rollout.py on each side: ours, transformers `generate` in batches, vLLM in its own environment."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from reporting import ROOT, cpu_seconds
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mas_hpc.rollout.engine import Request, RolloutStats, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine

VOCABULARY = 49152
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
BATCH = 32
"""Rows of a batch of `generate`."""


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scratch: Path) -> tuple[Path, PreTrainedModel]:
    """The folder that vLLM reads, and transformers' model from it, which never ends a completion by itself."""
    folder = scratch / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = None, 0
    return folder, peer


def random_tokens(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that share nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count, length), generator=generator).tolist()


def varied_lengths(count: int, *, mean: float, cap: int, seed: int) -> list[int]:
    """Completion lengths: exponential, cut at `cap`."""
    draw = random.Random(seed)
    return [min(cap, 1 + int(draw.expovariate(1 / mean))) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """`samples` completions of each of several prompts.

    Example: Groups(prompts=[[1, 5], [1, 6]], samples=2, new_tokens=[3, 9, 4, 1])
    """

    prompts: list[list[int]]
    samples: int
    new_tokens: list[int]

    @property
    def rows(self) -> list[list[int]]:
        return [prompt for prompt in self.prompts for _ in range(self.samples)]

    def ours(self, engine: NativeEngine) -> None:
        """Serve them with the native engine."""
        engine.load(version=0)
        work = zip(self.rows, self.new_tokens, strict=True)
        engine.generate([ask(prompt, count, seed) for seed, (prompt, count) in enumerate(work)])

    def theirs(self, model: PreTrainedModel) -> None:
        """Serve them in batches, each as long as its longest completion."""
        for first in range(0, len(self.rows), BATCH):
            generate(model, self.rows[first : first + BATCH], max(self.new_tokens[first : first + BATCH]))

    def case(self, name: str) -> dict[str, Any]:
        """As vllm_peer.py reads it."""
        return {"name": name, "prompts": self.rows, "new_tokens": self.new_tokens}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Agents in turn, `siblings` completions at every state, of which the first is continued by the next agent's cue.

    `new_tokens[turn][question][sibling]` are forced lengths. Every side continues the same made-up completions, so that
    all have the same work.
    """

    questions: list[list[int]]
    agents: tuple[str, ...]
    siblings: int
    cue: int
    new_tokens: list[list[list[int]]]

    def turns(self) -> list[tuple[str, list[list[int]], list[list[int]]]]:
        """(agent, prompt of each question, lengths of each question's siblings), with made-up transcripts."""
        prompts, turns = [list(question) for question in self.questions], []
        for number, agent in enumerate(self.agents):
            turns.append((agent, [list(prompt) for prompt in prompts], self.new_tokens[number]))
            for question, prompt in enumerate(prompts):
                made = random_tokens(1, self.new_tokens[number][question][0] + self.cue, seed=1000 * number + question)
                prompt += made[0]
        return turns

    def ours(self, engine: NativeEngine) -> tuple[RolloutStats, int]:
        """Serve a team that continues what it really sampled; what the engine did, and the distinct prompt tokens."""
        engine.load(version=0)
        before, paths = engine.stats, [list(question) for question in self.questions]
        spans: list[list[tuple[str, int]]] = [[("", len(question))] for question in self.questions]
        for number, agent in enumerate(self.agents):
            requests = [
                ask(paths[question], count, seed, policy=agent, spans=tuple(spans[question]))
                for question, counts in enumerate(self.new_tokens[number])
                for seed, count in enumerate(counts)
            ]
            first = engine.generate(requests)[:: self.siblings]
            if number + 1 == len(self.agents):
                break
            for question, completion in enumerate(first):
                cue = random_tokens(1, self.cue, seed=1000 * number + question)[0]
                paths[question] += [*completion.token_ids, *cue]
                spans[question] += [(agent, len(completion.token_ids)), ("", self.cue)]
        return engine.stats - before, sum(map(len, paths))

    def theirs(self, model: Any) -> None:
        """Independent batches of `generate`, one an agent under its own PEFT adapter."""
        for agent, prompts, lengths in self.turns():
            model.set_adapter(agent)
            rows = [prompt for prompt in prompts for _ in range(self.siblings)]
            for first in range(0, len(rows), BATCH):
                generate(model, rows[first : first + BATCH], max(map(max, lengths)))


def ask(
    prompt: Sequence[int], new_tokens: int, seed: int, *, policy: str = "shared", spans: tuple[tuple[str, int], ...] = ()
) -> Request:
    """One completion of a forced length at temperature 1."""
    return Request(
        prompt_ids=tuple(prompt), prompt_spans=spans or (("", len(prompt)),), policy=policy, seed=seed,
        sampling=SamplingParams(max_new_tokens=new_tokens),
    )  # fmt: skip


def generate(model: Any, rows: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> None:
    """One call of transformers: left-padded, sampled at temperature 1."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, top_k=0,
        **options,
    )  # fmt: skip


class _Clock(StoppingCriteria):
    """Notes the CPU time after every token of `generate`; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def decode_theirs(model: PreTrainedModel, batch: int, context: int, steps: int) -> float:
    """Mean CPU seconds of a decoding step of `generate`."""
    clock = _Clock()
    generate(
        model, random_tokens(batch, context, seed=batch), steps + 1, stopping_criteria=StoppingCriteriaList([clock])
    )  # fmt: skip
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def decode_ours(engine: NativeEngine, batch: int, context: int, steps: int) -> float:
    """Mean CPU seconds of a decoding step, of those in which all rows decode."""
    engine.load(version=0)
    for seed, prompt in enumerate(random_tokens(batch, context, seed=batch)):
        engine.submit([ask(prompt, steps + 100, seed)])
    start = engine.stats
    while engine.stats.prefilled_tokens - start.prefilled_tokens < batch * context:
        engine.poll()
    engine.poll()  # all are laid out now
    before = engine.stats
    while (engine.stats - before).steps < steps:
        engine.poll()
    spent = engine.stats - before
    assert spent.row_steps == batch * spent.steps
    engine.cancel()
    return spent.cpu_s / spent.steps


class VLLM:
    """vllm_peer.py, which holds one engine as long as this context is open."""

    def __enter__(self) -> VLLM:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [str(VLLM_PYTHON), str(Path(__file__).with_name("vllm_peer.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True,
        )  # fmt: skip
        return self

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a job; the first one describes the engine."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it has ended: the missing answer says so
            self._process.stdin.write(f"{json.dumps(job)}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise SystemExit(f"vllm_peer.py failed:\n{self._errors.read()[-2000:]}")
        return json.loads(answer)

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._errors.close()


def hardware() -> tuple[float, float]:
    """(bytes read a second, multiply-adds as FLOP a second) of one core."""
    data, left, right = torch.ones(1 << 27), torch.randn(1024, 1024), torch.randn(1024, 1024)
    read = median(cpu_seconds(data.sum) for _ in range(5))
    multiply = median(cpu_seconds(lambda: left @ right) for _ in range(9))
    return data.nbytes / read, 2 * 1024**3 / multiply


def alternating(measures: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """The measurements of each, taken in turn."""
    return [list(column) for column in zip(*([measure() for measure in measures] for _ in range(repeats)), strict=True)]
