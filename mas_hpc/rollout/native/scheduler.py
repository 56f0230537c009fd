"""Which requests are live: rows in order of their prompts, admitted as others finish. No tensors here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.types import Finish

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What K/V depends on: tokens, and the adapter of each (-1: the base model). Equal ones are one object.

    Example: Prompt((5, 6), (-1, 0))
    """

    token_ids: tuple[int, ...]
    adapters: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Row:
    """One request on its way to a completion: the engine's only mutable record."""

    number: int
    """Place among the requests of the call."""
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

    @property
    def num_left(self) -> int:
        """Tokens that it may still sample."""
        return self.request.sampling.max_new_tokens - len(self.token_ids)

    def append(self, token: int, logprob: float, decode: Decode) -> None:
        """Take a sampled token; sets `finish` when it ends the completion."""
        if not math.isfinite(logprob):
            self.finish, self.error = (
                "error",
                f"logits are not finite after {len(self.token_ids)} tokens: model diverged",
            )
            return
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        sampling = self.request.sampling
        if token in sampling.stop_ids or (sampling.stop_strings and self._stopped(sampling.stop_strings, decode)):
            self.finish = "stop"
        elif not self.num_left:
            self.finish = "length"

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
            finish=self.finish, error=self.error, policy_version=version,
        )  # fmt: skip


class Scheduler:
    """At most `max_rows` live rows; those of one prompt are admitted together, as far as there is room."""

    def __init__(self, rows: Iterable[Row], max_rows: int) -> None:
        self._waiting = deque(sorted(rows, key=lambda row: (row.prompt.token_ids, row.prompt.adapters, row.number)))
        self._max_rows = max_rows
        self.live: list[Row] = []

    def admit(self) -> list[Row]:
        """Drop finished rows and fill up; return the rows that came in."""
        self.live = [row for row in self.live if row.finish is None]
        room = min(self._max_rows - len(self.live), len(self._waiting))
        fresh = [self._waiting.popleft() for _ in range(room)]
        self.live += fresh
        return fresh

    @property
    def done(self) -> bool:
        """Nothing is live and nothing waits."""
        return not self._waiting and all(row.finish is not None for row in self.live)

    @property
    def stale(self) -> bool:
        """So many rows have finished that dropping them, and refilling, pays for laying out the others anew."""
        return sum(row.finish is not None for row in self.live) >= max(1, len(self.live) // 8)

    @property
    def prompts(self) -> set[Prompt]:
        """Prompts whose K/V must stay: of live rows, and of the next one to come in."""
        waiting = {self._waiting[0].prompt} if self._waiting else set()
        return waiting | {row.prompt for row in self.live if row.finish is None}
