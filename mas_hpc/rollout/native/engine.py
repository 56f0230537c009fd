"""The rollout engine that runs the trainer's own model: shared prefixes once, continuous refill, per-token adapters.

Legend: B rows, G prompts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mas_hpc.errors import RolloutError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.rollout.engine import BASE_POLICY, Completion, Request, RolloutEngine, RolloutStats, Weights
from mas_hpc.rollout.native.kv_tree import CAPACITY_STEP, Bucket, Context, DecodeAttention, Tails, buckets, row_order
from mas_hpc.rollout.native.runner import Runner
from mas_hpc.rollout.native.sampler import SamplingColumns, columns, sample, uniforms
from mas_hpc.rollout.native.scheduler import Prompt, Row, Scheduler

Scope = Literal["sequence", "speaker"]
PromptKey = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Layout:
    """Rows as they lie in the decode batch, until enough have finished to lay them out anew."""

    rows: list[Row]
    attend: DecodeAttention
    adapter_B: Tensor
    position_B: Tensor
    sampling: SamplingColumns


class NativeEngine(RolloutEngine):
    """Serves completions of a model in this process.

    `model` is `prepare`d (models.attention) and stays the trainer's: its weights are read as they are at each call, in
    evaluation mode. With a `bank`, a request's policy names its adapter: `sequence` scope adapts prompt and completion,
    `speaker` scope each token by who wrote it. Without one, the same model serves every policy. `max_rows` bounds the
    rows that are decoded at a time.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, bank: AdapterBank | None = None,
        scope: Scope = "sequence", max_rows: int = 64,
    ) -> None:  # fmt: skip
        assert max_rows > 0
        self._stats = RolloutStats()
        self._waiting: list[Request] = []
        self._first = 0
        self._model = model
        self._device = model.device
        self._context_limit: int = model.config.max_position_embeddings
        self._tokenizer = tokenizer
        self._policies = bank.index if bank is not None else None
        self._scope = scope
        self._max_rows = max_rows
        self._runner = Runner(model, bank)
        self._generator = torch.Generator()
        self._version = 0

    @property
    def stats(self) -> RolloutStats:
        """Totals since the engine was made."""
        return self._stats

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """Stamp completions with `version`: the weights are the trainer's own and nothing derived from them is kept."""
        self._version = version
        return ""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue requests."""
        for request in requests:
            self._adapter(request.policy)
        self._waiting += requests
        return list(range(self._first + len(self._waiting) - len(requests), self._first + len(self._waiting)))

    def cancel(self) -> None:
        """Forget what waits."""
        self._first += len(self._waiting)
        self._waiting.clear()

    def poll(self) -> list[tuple[int, Completion]]:
        """Serve everything that waits."""
        numbers = range(self._first, self._first + len(self._waiting))
        completions = self._serve(self._waiting)
        self._waiting, self._first = [], numbers.stop
        return list(zip(numbers, completions, strict=True))

    def _serve(self, requests: Sequence[Request]) -> list[Completion]:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        prompts: dict[PromptKey, Prompt] = {}
        rows = [self._row(number, request, prompts) for number, request in enumerate(requests)]
        with torch.inference_mode(), _evaluating(self._model):
            self._run(Scheduler((row for row in rows if row.finish is None), self._max_rows))
        elapsed_s = time.perf_counter() - wall_s
        completions = [replace(row.completion(self._decode, self._version), wall_s=elapsed_s) for row in rows]
        self._count(
            requests=len(rows), prompt_tokens=sum(len(row.prompt.token_ids) for row in rows),
            decoded_tokens=sum(len(row.token_ids) for row in rows),
            wall_s=time.perf_counter() - wall_s, cpu_s=time.process_time() - cpu_s,
        )  # fmt: skip
        return completions

    def _run(self, scheduler: Scheduler) -> None:
        """Admit, lay out, decode until enough rows have finished; again until none is left."""
        contexts: dict[Prompt, Context] = {}
        layout: _Layout | None = None
        while not scheduler.done:
            fresh = scheduler.admit()
            if fresh:
                self._start(fresh, contexts)
            kept = scheduler.prompts
            contexts = {prompt: context for prompt, context in contexts.items() if prompt in kept}
            live = [row for row in scheduler.live if row.finish is None]
            if len(live) < len(scheduler.live) or not live:
                continue
            layout = self._lay_out(live, contexts, layout)
            while not scheduler.stale:
                self._step(layout)

    def _start(self, fresh: Sequence[Row], contexts: dict[Prompt, Context]) -> None:
        """Prefill the prompts that are not there yet, and draw the first token of each row."""
        missing = [prompt for prompt in dict.fromkeys(row.prompt for row in fresh) if prompt not in contexts]
        if missing:
            added, num_tokens = self._runner.prefill(missing)
            contexts.update(zip(missing, added, strict=True))
            self._count(prefilled_tokens=num_tokens)
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in fresh))}
        logits_GV = self._runner.logits(torch.stack([contexts[prompt].hidden_E for prompt in place]))
        self._draw(fresh, logits_GV[[place[row.prompt] for row in fresh]], self._columns(fresh))

    def _lay_out(self, live: list[Row], contexts: dict[Prompt, Context], previous: _Layout | None) -> _Layout:
        rows = [live[i] for i in row_order([contexts[row.prompt] for row in live])]
        paths = [contexts[row.prompt] for row in rows]
        place = {id(row): i for i, row in enumerate(previous.rows)} if previous else {}
        before: Sequence[Bucket] = previous.attend.buckets if previous else ()
        tails = previous.attend.tails if previous else Tails(paths[0].tree_L2KTD[:, :, :, :0].unsqueeze(3), [], 0)
        spare = min(CAPACITY_STEP, max(row.num_left for row in rows))
        attend = DecodeAttention(buckets(paths, before), tails.keep([place.get(id(row)) for row in rows], spare))
        position_B = [len(row.prompt.token_ids) + len(row.token_ids) - 1 for row in rows]
        return _Layout(
            rows=rows, attend=attend, sampling=self._columns(rows),
            adapter_B=torch.tensor([row.adapter for row in rows], device=self._device),
            position_B=torch.tensor(position_B, device=self._device),
        )  # fmt: skip

    def _step(self, layout: _Layout) -> None:
        last_B = [row.token_ids[-1] for row in layout.rows]
        logits_BV = self._runner.decode(last_B, layout.position_B, layout.adapter_B, layout.attend)
        self._draw(layout.rows, logits_BV, layout.sampling)
        # A row that has finished but is not dropped yet must not run over the position table.
        layout.position_B.add_(1).clamp_(max=self._context_limit - 1)
        self._count(steps=1, row_steps=len(layout.rows))

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor, sampling: SamplingColumns) -> None:
        """Sample a token for each row; rows that have finished but are not dropped yet take none."""
        uniform_B = [0.0 if row.finish else row.uniforms[len(row.token_ids)] for row in rows]
        for row, token, logprob in zip(rows, *sample(logits_BV, sampling, uniform_B), strict=True):
            if row.finish is None:
                row.append(token, logprob, self._decode)

    def _row(self, number: int, request: Request, prompts: dict[PromptKey, Prompt]) -> Row:
        adapter = self._adapter(request.policy)
        key = request.prompt_ids, self._prompt_adapters(request, adapter)
        prompt = prompts.setdefault(key, Prompt(*key))
        sampling = request.sampling
        row = Row(
            number=number, request=request, prompt=prompt, adapter=adapter,
            uniforms=uniforms(request.seed, sampling.max_new_tokens, self._generator),
        )  # fmt: skip
        row.error = self._refusal(request)
        row.finish = "error" if row.error else None
        return row

    def _prompt_adapters(self, request: Request, adapter: int) -> tuple[int, ...]:
        length = len(request.prompt_ids)
        assert sum(count for _, count in request.prompt_spans) == length, "prompt_spans do not cover prompt_ids"
        if self._scope == "sequence":
            return (adapter,) * length
        spans = ([self._adapter(policy) if policy else -1] * count for policy, count in request.prompt_spans)
        return tuple(chain.from_iterable(spans))

    def _adapter(self, policy: str) -> int:
        if self._policies is None or policy == BASE_POLICY:
            return -1
        if policy not in self._policies:
            raise RolloutError(
                f"policy {policy!r}: the engine has no adapter of that name; expected one of {sorted(self._policies)}; "
                "add it to the adapters of the model or map the agent to another policy"
            )
        return self._policies[policy]

    def _refusal(self, request: Request) -> str:
        """Why a request cannot be served; "" when it can."""
        if not request.prompt_ids:
            return "the prompt is empty: the first token is predicted from at least one; begin it with a bos token"
        wanted = len(request.prompt_ids) + request.sampling.max_new_tokens
        if wanted > self._context_limit:
            return (
                f"prompt of {len(request.prompt_ids)} tokens + max_new_tokens={request.sampling.max_new_tokens} "
                f"is {wanted}, beyond the model's context of {self._context_limit}; "
                "shorten the prompt or lower max_new_tokens"
            )
        return ""

    def _columns(self, rows: Sequence[Row]) -> SamplingColumns:
        return columns([row.request.sampling for row in rows], self._device, len(self._runner.head.weight))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.batch_decode([list(token_ids)], skip_special_tokens=True)[0]

    def _count(self, **added: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + value for name, value in added.items()})


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout and gradient checkpointing off; the trainer finds the mode it left."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
