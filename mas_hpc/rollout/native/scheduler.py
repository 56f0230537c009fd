"""Which requests are live: rows are admitted as others finish and as there is room for their keys and values."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mas_hpc.prefix_tree import IntArray
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.native.kv_tree import KVTree, Node, path_keys
from mas_hpc.types import Finish

Decode = Callable[[Sequence[int]], str]
HORIZON = 32
"""Tokens for which a row must have room; what exceeds it is found later, by evicting prefixes or setting rows back."""


@dataclass(slots=True, eq=False)
class Prompt:
    """What a row continues: equal ones that are under way are one object."""

    token_ids: tuple[int, ...]
    adapters: tuple[int, ...]
    """Of each token; -1: the base model."""
    leaf: Node | None = None
    """Where its path ends, pinned, while a row reads it."""
    hidden_E: Tensor | None = None
    """Last hidden state: it predicts the first token of every completion."""
    num_rows: int = 0
    """Unfinished rows, waiting ones included."""

    @property
    def key_T(self) -> IntArray:
        """As the KV tree knows it."""
        return path_keys(self.token_ids, self.adapters)


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One request on its way to a completion: the engine's mutable record."""

    number: int
    """What `submit` returned."""
    request: Request
    prompt: Prompt
    adapter: int
    """Adapter of the completion's tokens."""
    uniforms: list[float]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None
    """None while live."""
    error: str = ""
    since: float = field(default_factory=time.perf_counter)

    @property
    def num_left(self) -> int:
        """Tokens that it may still sample."""
        return self.request.sampling.max_new_tokens - len(self.token_ids)

    @property
    def num_decoded(self) -> int:
        """Tokens sampled since its prompt, which after it was set back contains earlier ones."""
        return len(self.request.prompt_ids) + len(self.token_ids) - len(self.prompt.token_ids)

    @property
    def num_needed(self) -> int:
        """Slots that it may fill before room is looked for again."""
        return self.num_decoded + min(self.num_left, HORIZON)

    def append(self, token: int, logprob: float, decode: Decode) -> None:
        """Take a sampled token; sets `finish` when it ends the completion."""
        if not math.isfinite(logprob):
            self.fail(f"logits are not finite after {len(self.token_ids)} tokens: model diverged")
            return
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        sampling = self.request.sampling
        if token in sampling.stop_ids or (sampling.stop_strings and self._stopped(sampling.stop_strings, decode)):
            self.finish = "stop"
        elif not self.num_left:
            self.finish = "length"

    def fail(self, error: str) -> None:
        """End it with a reason."""
        self.finish, self.error = "error", error

    def _stopped(self, stop_strings: tuple[str, ...], decode: Decode) -> bool:
        """A character takes at most 4 tokens, so a short tail shows every candidate; the whole text confirms it."""
        tail = self.token_ids[-4 * max(map(len, stop_strings)) - 4 :]
        for ids in (tail, self.token_ids):
            text = decode(ids)
            if not any(stop in text for stop in stop_strings):
                return False
        return True

    def completion(self, decode: Decode, version: int) -> Completion:
        """The finished row as a record."""
        assert self.finish is not None
        return Completion(
            token_ids=tuple(self.token_ids), logprobs=tuple(self.logprobs), text=decode(self.token_ids),
            finish=self.finish, error=self.error, policy_version=version, wall_s=time.perf_counter() - self.since,
        )  # fmt: skip


class Scheduler:
    """At most `max_rows` live rows, in the order in which they came; room in the tree decides, too.

    A row is `live` from admission until it is dropped. Slots are counted for the nodes of the tree, and besides for the
    tails of the live rows (all as wide as the longest and what it soon adds) and each live prompt (decoding copies it).
    """

    def __init__(self, tree: KVTree, max_rows: int) -> None:
        self.tree = tree
        self.live: list[Row] = []
        self._waiting: list[Row] = []
        self._prompts: dict[tuple[tuple[int, ...], tuple[int, ...]], Prompt] = {}
        self._max_rows = max_rows

    def prompt(self, token_ids: tuple[int, ...], adapters: tuple[int, ...]) -> Prompt:
        """The prompt under way that equals this, or a new one."""
        return self._prompts.setdefault((token_ids, adapters), Prompt(token_ids, adapters))

    def add(self, rows: Iterable[Row]) -> None:
        """Queue rows; those of one prompt, and of prompts that begin alike, next to each other."""
        rows = sorted(rows, key=lambda row: (row.prompt.token_ids, row.prompt.adapters, row.number))
        for row in rows:
            row.prompt.num_rows += 1
        self._waiting[:0] = rows[::-1]

    def admit(self) -> list[Row]:
        """Let waiting rows in, as far as there is room; return them. One that could not fit alone has failed."""
        fresh: list[Row] = []
        count, width, copied = self._taken() if self._waiting else (0, 0, 0)
        while self._waiting and len(self.live) < self._max_rows:
            row = self._waiting[-1]
            count, width = count + 1, max(width, row.num_needed)
            copied += len(row.prompt.token_ids) if row.prompt.leaf is None else 0
            charge = count * width + copied
            if not self._hold(row.prompt, charge):
                if self.live:
                    break
                self._let_go()
                if not self._hold(row.prompt, charge):
                    self._refuse(row)
            self._waiting.pop()
            self.live.append(row)
            fresh.append(row)
        return fresh

    def victim(self) -> Row | None:
        """A row to be set back, if the live ones have no room to go on: its tail goes into the tree, then `set_back`.

        One that has decoded much more than the others makes the tails of all as wide, and goes first; else the last to come.
        """
        live = [row for row in self.live if row.finish is None]
        count, width, copied = self._taken()
        charge = count * width + copied
        if not live or self.tree.make_room(charge):
            return None
        self._let_go()
        if self.tree.make_room(charge):
            return None
        longest = max(live, key=lambda row: row.num_decoded)
        usual = sum(row.num_decoded for row in live) / len(live)
        return longest if longest.num_decoded > 2 * usual + HORIZON else live[-1]

    def set_back(self, row: Row) -> None:
        """Let a live row wait again, to continue what it has; one that was alone could never end, and fails."""
        if sum(other.finish is None for other in self.live) == 1:
            self._refuse(row)
            return
        self.live.remove(row)
        self.release(row)
        sampled = tuple(row.token_ids)
        adapters = row.prompt.adapters[: len(row.request.prompt_ids)] + (row.adapter,) * len(sampled)
        row.prompt = self.prompt(row.request.prompt_ids + sampled, adapters)
        row.prompt.num_rows += 1
        self._waiting.append(row)

    def release(self, row: Row) -> None:
        """The row reads its prompt no longer."""
        prompt = row.prompt
        prompt.num_rows -= 1
        if not prompt.num_rows:
            del self._prompts[prompt.token_ids, prompt.adapters]
            if prompt.leaf is not None:
                self.tree.unpin(prompt.leaf)
                prompt.leaf = None

    def drop(self) -> list[Row]:
        """Forget the finished rows; return them."""
        ended = [row for row in self.live if row.finish is not None]
        self.live = [row for row in self.live if row.finish is None]
        return ended

    def clear(self) -> None:
        """Forget every row and, as it may be half written, the tree."""
        self.tree = KVTree(self.tree.capacity)
        self.live, self._waiting, self._prompts = [], [], {}

    @property
    def num_ended(self) -> int:
        """Live rows that have finished."""
        return sum(row.finish is not None for row in self.live)

    @property
    def idle(self) -> bool:
        """Nothing is live and nothing waits."""
        return not self.live and not self._waiting

    def _hold(self, prompt: Prompt, charge: int) -> bool:
        """Pin the prompt if there is room for it and besides for `charge`."""
        if prompt.leaf is not None:
            return self.tree.make_room(charge)
        prompt.leaf = self.tree.hold(prompt.key_T, charge)
        return prompt.leaf is not None

    def _let_go(self) -> None:
        """Unpin the prompts that only waiting rows have: those that are live come first."""
        read = {id(row.prompt) for row in self.live}
        for prompt in self._prompts.values():
            if prompt.leaf is not None and id(prompt) not in read:
                self.tree.unpin(prompt.leaf)
                prompt.leaf = prompt.hidden_E = None

    def _taken(self) -> tuple[int, int, int]:
        """Memory beside the tree, in slots: number and width of the live rows' tails, and their prompts, which are copied."""
        rows = [row for row in self.live if row.finish is None]
        prompts = {id(row.prompt): len(row.prompt.token_ids) for row in rows}
        return len(rows), max((row.num_needed for row in rows), default=0), sum(prompts.values())

    def _refuse(self, row: Row) -> None:
        needed = 2 * len(row.prompt.token_ids) + row.num_needed
        row.fail(
            f"out of memory for keys and values: a prompt of {len(row.prompt.token_ids)} tokens needs room for {needed}, but "
            f"rollout.kv_gib holds {self.tree.capacity}; raise rollout.kv_gib, or shorten prompts and completions"
        )
