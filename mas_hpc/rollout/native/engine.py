"""The rollout engine that runs the trainer's own model: a KV tree, continuous refill, chunked prefill, per-token adapters.

A forward pass runs a chunk of prompts and one token of each decoding row. What a row has decoded goes into the tree when
it ends, so the next speaker of the episode finds the transcript there.
Legend: B rows, N tokens of a chunk, V vocabulary, E hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.weights import assign_weights
from mas_hpc.rollout.engine import BASE_POLICY, Completion, Request, RolloutEngine, RolloutStats, Weights
from mas_hpc.rollout.native.decode_attention import DecodeAttention
from mas_hpc.rollout.native.decode_layout import lay_out
from mas_hpc.rollout.native.kv_pool import KVPool, KVShape
from mas_hpc.rollout.native.kv_tree import KVTree, path_keys
from mas_hpc.rollout.native.prefill import Chunk, plan
from mas_hpc.rollout.native.runner import Runner
from mas_hpc.rollout.native.sampler import SamplingColumns, columns, sample, uniforms
from mas_hpc.rollout.native.scheduler import Prompt, Row, Scheduler
from mas_hpc.rollout.native.tails import CAPACITY_STEP
from mas_hpc.rollout.refusals import unknown_policy, unservable

Scope = Literal["sequence", "speaker"]
STEPS_PER_POLL = 8
ALONE = 8
"""A chunk without decoding rows, which nobody waits for, may be so many times as long."""
RELAYOUT = 8
"""Laying rows out anew pays when one in so many has finished, or waits to join."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Layout:
    """Rows as they lie in the decode batch, until enough have finished or joined to lay them out anew."""

    rows: list[Row]
    attend: DecodeAttention
    adapter_B: Tensor
    position_B: Tensor
    sampling: SamplingColumns


class NativeEngine(RolloutEngine):
    """Serves completions of a model in this process.

    `model` is `prepare`d (models.attention) and may be the trainer's: its weights are read as they are at each call, in
    evaluation mode, and what was derived from others is dropped at `load`, or when torch has seen them change. With a
    `bank`, a request's policy names its adapter: `sequence` scope adapts prompt and completion, `speaker` scope each token
    by who wrote it; what policies of `other_models` wrote is read by the base. Without one, the model serves every policy.
    `max_rows` bounds the rows that are live at a time, `kv_bytes` their keys and values together with those that are kept for
    later, `prefill_chunk` the prompt tokens of a step.

    Of a model that was cut (distributed.tensor_layers), each rank has keys and values of its own heads, `kv_bytes` of them; all
    are asked the same (rollout.tensor), and take the tokens that the first has drawn.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, bank: AdapterBank | None = None,
        scope: Scope = "sequence", other_models: Collection[str] = (), max_rows: int = 64, kv_bytes: int = 4 << 30,
        prefill_chunk: int = 512,
    ) -> None:  # fmt: skip
        assert max_rows > 0 and prefill_chunk > 0
        self._model, self._tokenizer, self._bank, self._scope = model, tokenizer, bank, scope
        self._device = model.device
        self._context_limit: int = model.config.max_position_embeddings
        self._policies = bank.index if bank is not None else None
        self._unadapted = frozenset({"", *other_models})
        """Who else may have written tokens of a prompt."""
        self._runner = Runner(model, bank)
        tensor = self._tensor = self._runner.tensor
        self._shape = KVShape.of(model.config, model.dtype, model.device, parts=tensor.size if tensor else 1)
        self._scheduler = Scheduler(KVTree(kv_bytes // self._shape.token_bytes), max_rows)
        self._pool = KVPool(self._shape, self._scheduler.tree.capacity)
        self._chunk_limit = prefill_chunk
        self._layout: _Layout | None = None
        self._undrawn: list[Row] = []
        """Admitted rows that wait for their prompt."""
        self._joining: list[Row] = []
        """Rows with a first token that are not laid out yet."""
        self._refused: list[Row] = []
        self._generator = torch.Generator()
        self._version = 0
        self._stats = RolloutStats()
        self._seen_weights = -1
        self._was_training = False

    @property
    def stats(self) -> RolloutStats:
        """Totals since the engine was made."""
        return self._stats

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """Serve `weights`, or the model's as they are now, as `version`; keys and values of the old ones are dropped."""
        self._version = version
        self.sleep()
        return assign_weights(self._model, self._bank, weights) if weights is not None else ""

    def sleep(self) -> None:
        """Drop keys, values and the packed copy of the weights."""
        assert self._idle, "sleep or load while requests are outstanding"
        self._seen_weights = -1
        self._forget()
        self._runner.packed.clear()

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue requests; one that cannot be served ends with finish="error".

        Raises RolloutError, and queues none, when the bank has no adapter of a request's policy.
        """
        adapters = [self._prompt_adapters(request) for request in requests]
        if self._idle:
            self._begin()
        first = self._stats.requests
        numbered = enumerate(zip(requests, adapters, strict=True), first)
        rows = [self._row(number, request, prompt_adapters) for number, (request, prompt_adapters) in numbered]
        self._refused += [row for row in rows if row.finish is not None]
        self._scheduler.add(row for row in rows if row.finish is None)
        self._count(requests=len(rows))
        return [row.number for row in rows]

    def poll(self) -> list[tuple[int, Completion]]:
        """Work for at most STEPS_PER_POLL steps, or until some rows end; return what has ended."""
        if self._idle:
            return []
        wall_s, cpu_s, evicted = time.perf_counter(), time.process_time(), self._scheduler.tree.evicted
        with torch.inference_mode(), self._runner.packed.used(), self._runner.lean.used():
            while (row := self._scheduler.victim()) is not None:
                self._set_back(row)
            for _ in range(STEPS_PER_POLL):
                self._admit()
                if not self._step() or self._scheduler.num_ended * RELAYOUT >= len(self._scheduler.live):
                    break
            ended = self._retire()
        self._count(
            wall_s=time.perf_counter() - wall_s, cpu_s=time.process_time() - cpu_s,
            evicted_tokens=self._scheduler.tree.evicted - evicted,
        )  # fmt: skip
        if self._idle:
            self._end()
        return ended

    def cancel(self) -> None:
        """Forget what is outstanding, and all keys and values: a pass may have been interrupted half-way."""
        self._forget()
        self._end()

    # ---- a step

    def _admit(self) -> None:
        admitted = [row for row in self._scheduler.admit() if row.finish is None]
        self._undrawn += admitted
        if admitted:
            self._count(prompt_tokens=sum(len(row.prompt.token_ids) for row in admitted))

    def _step(self) -> bool:
        """One forward pass and what it lets sample; whether there was anything to do."""
        self._lay_out_if_stale()
        leaves = dict.fromkeys(row.prompt.leaf for row in self._undrawn if row.prompt.hidden_E is None)
        limit = self._chunk_limit * (1 if self._layout else ALONE)
        chunk = plan((leaf for leaf in leaves if leaf is not None), limit)
        hidden_BE = self._forward(chunk)
        fresh = [row for row in self._undrawn if row.prompt.hidden_E is not None]
        if fresh:
            self._undrawn = [row for row in self._undrawn if row.prompt.hidden_E is None]
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in fresh))}
        hidden = [*(prompt.hidden_E for prompt in place if prompt.hidden_E is not None)]
        hidden += [] if hidden_BE is None else [*hidden_BE]
        if not hidden:
            return chunk is not None
        logits = self._runner.logits(torch.stack(hidden))
        if fresh:
            self._draw(fresh, logits[[place[row.prompt] for row in fresh]], self._columns(fresh))
            self._joining += [row for row in fresh if row.finish is None]
        if self._layout and hidden_BE is not None:
            self._draw(self._layout.rows, logits[len(place) :], self._layout.sampling)
            # A row that has finished but is not dropped yet must not run over the position table.
            self._layout.position_B.add_(1).clamp_(max=self._context_limit - 1)
        return True

    def _forward(self, chunk: Chunk | None) -> Tensor | None:
        """Run the chunk and a decoding step, as far as there is either; hidden states of the decoding rows."""
        layout, hidden_NE, hidden_BE = self._layout, None, None
        if layout is not None:
            decoding = ([row.token_ids[-1] for row in layout.rows], layout.position_B, layout.adapter_B, layout.attend)
            if chunk is None:
                hidden_BE = self._runner.decode(*decoding)
            else:
                hidden_NE, hidden_BE = self._runner.both(chunk, self._pool, *decoding)
            self._count_decoding(layout)
        elif chunk is not None:
            hidden_NE = self._runner.prefill(chunk, self._pool)
        if chunk is not None and hidden_NE is not None:
            last = {leaf: hidden_NE[place] for leaf, place in chunk.ends}
            for row in self._undrawn:
                if row.prompt.leaf in last:
                    row.prompt.hidden_E = last[row.prompt.leaf].clone()
            self._count(prefilled_tokens=len(chunk))
        self._count(steps=int(chunk is not None or layout is not None))
        return hidden_BE

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor, sampling: SamplingColumns) -> None:
        """Sample a token for each row; rows that have finished but are not dropped yet take none."""
        uniform_B = [0.0 if row.finish else row.uniforms[len(row.token_ids)] for row in rows]
        before = sum(len(row.token_ids) for row in rows)
        drawn = sample(logits_BV, sampling, uniform_B)
        for row, token, logprob in zip(rows, *(self._tensor.agree(*drawn) if self._tensor else drawn), strict=True):
            if row.finish is None:
                row.append(token, logprob, self._decode)
        self._count(decoded_tokens=sum(len(row.token_ids) for row in rows) - before)

    # ---- the decode batch

    def _lay_out_if_stale(self) -> None:
        rows = self._layout.rows if self._layout else []
        live = [row for row in rows if row.finish is None]
        if (len(rows) - len(live) + len(self._joining)) * RELAYOUT >= max(1, len(rows)):
            self._keep([row for row in self._scheduler.live if row.finish is not None])
            self._lay_out([*live, *self._joining])

    def _lay_out(self, live: Sequence[Row]) -> None:
        """Make these rows the decode batch."""
        previous, self._layout, self._joining = self._layout, None, []
        if not live:
            return
        contexts = [row.prompt.leaf for row in live if row.prompt.leaf is not None]
        place = {id(row): i for i, row in enumerate(previous.rows)} if previous else {}
        spare = min(CAPACITY_STEP, max(row.num_left for row in live))
        attend, order = lay_out(
            contexts, [place.get(id(row)) for row in live], self._pool, previous.attend if previous else None, spare=spare
        )
        rows = [live[i] for i in order]
        position_B = [len(row.request.prompt_ids) + len(row.token_ids) - 1 for row in rows]
        self._layout = _Layout(
            rows=rows, attend=attend, sampling=self._columns(rows),
            adapter_B=torch.tensor([row.adapter for row in rows], device=self._device),
            position_B=torch.tensor(position_B, device=self._device),
        )  # fmt: skip

    def _retire(self) -> list[tuple[int, Completion]]:
        """Put what ended rows have decoded into the tree, and let go of them."""
        ended = self._scheduler.drop()
        self._keep(ended)
        for row in ended:
            self._scheduler.release(row)
        ended += self._refused
        self._refused = []
        return [(row.number, row.completion(self._decode, self._version)) for row in ended]

    def _set_back(self, row: Row) -> None:
        """Let a row wait again for want of room; what it has decoded stays while nobody needs its place."""
        self._keep([row])
        self._scheduler.set_back(row)
        self._joining = [other for other in self._joining if other is not row]
        self._undrawn = [other for other in self._undrawn if other is not row]
        if self._layout:
            self._lay_out(
                [other for other in [*self._layout.rows, *self._joining] if other.finish is None and other is not row]
            )

    def _keep(self, rows: Sequence[Row]) -> None:
        """Copy the keys and values of decoded tokens from the tails into the tree, below their prompts; not of errors."""
        if not self._layout:
            return
        attend, tree = self._layout.attend, self._scheduler.tree
        place = {id(row): i for i, row in enumerate(self._layout.rows)}
        tokens: list[tuple[int, int, int]] = []
        for row in (row for row in rows if id(row) in place and row.finish != "error"):
            assert row.prompt.leaf is not None
            number = place[id(row)]
            sampled = row.token_ids[len(row.token_ids) - row.num_decoded :][: attend.num_decoded(number)]
            if sampled and tree.make_room(len(sampled)):
                key_T = path_keys(sampled, [row.adapter] * len(sampled))
                tokens += [(number, i, slot) for i, slot in tree.fill(key_T, below=row.prompt.leaf)]
        if tokens:
            attend.store(tokens, self._pool)

    # ---- requests

    def _row(self, number: int, request: Request, adapters: tuple[int, ...]) -> Row:
        refusal = unservable(request, self._context_limit)
        row = Row(
            number=number, request=request, adapter=self._adapter(request.policy),
            prompt=Prompt((), ()) if refusal else self._scheduler.prompt(request.prompt_ids, adapters),
            uniforms=uniforms(request.seed, request.sampling.max_new_tokens, self._generator),
        )  # fmt: skip
        if refusal:
            row.fail(refusal)
        return row

    def _prompt_adapters(self, request: Request) -> tuple[int, ...]:
        adapter, length = self._adapter(request.policy), len(request.prompt_ids)
        assert sum(count for _, count in request.prompt_spans) == length, "prompt_spans do not cover prompt_ids"
        if self._scope == "sequence":
            return (adapter,) * length
        spans = ([-1 if policy in self._unadapted else self._adapter(policy)] * count for policy, count in request.prompt_spans)
        return tuple(chain.from_iterable(spans))

    def _adapter(self, policy: str) -> int:
        if self._policies is None or policy == BASE_POLICY:
            return -1
        if policy not in self._policies:
            raise unknown_policy(policy, self._policies)
        return self._policies[policy]

    def _columns(self, rows: Sequence[Row]) -> SamplingColumns:
        return columns([row.request.sampling for row in rows], self._device, self._runner.vocabulary)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.batch_decode([list(token_ids)], skip_special_tokens=True)[0]

    # ---- the state between calls

    @property
    def _idle(self) -> bool:
        return self._scheduler.idle and not self._refused

    def _begin(self) -> None:
        """Before the first of some requests: evaluation mode, and nothing that was derived from other weights."""
        seen = sum(parameter._version for parameter in self._model.parameters())
        if seen != self._seen_weights:
            self._forget()
            self._runner.packed.pack()
            self._seen_weights = seen
        self._was_training = self._model.training
        if self._was_training:
            self._model.eval()

    def _end(self) -> None:
        """After the last: the trainer finds the mode that it left."""
        if self._was_training:
            self._model.train()
            self._was_training = False

    def _forget(self) -> None:
        """Drop every request and every key and value."""
        self._scheduler.clear()
        self._pool = KVPool(self._shape, self._scheduler.tree.capacity)
        self._layout, self._undrawn, self._joining, self._refused = None, [], [], []

    def _count(self, **added: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + value for name, value in added.items()})

    def _count_decoding(self, layout: _Layout) -> None:
        real, padded = layout.attend.keys()
        dead = sum(row.finish is not None for row in layout.rows)
        self._count(row_steps=len(layout.rows), idle_row_steps=dead, real_keys=real, padded_keys=padded)
        taken = self._pool.num_bytes + layout.attend.num_bytes
        self._stats = replace(self._stats, peak_kv_bytes=max(taken, self._stats.peak_kv_bytes))
