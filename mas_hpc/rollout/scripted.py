"""An engine with behaviour instead of a model: for tests of everything that talks to engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, RolloutStats, Weights

Behaviour = Callable[[Request], Completion | str]


class ScriptedEngine(RolloutEngine):
    """Answers each request with what `behaviour` makes of it.

    A text is encoded, ended by the request's first stop id (if any) and cut at max_new_tokens; every token gets the
    log-prob `logprob`. A Completion is returned as it is, but for its policy version. `order` (of request numbers) says
    which of those that wait end at a poll, as completions of different lengths would; by default all do.
    Example: ScriptedEngine(lambda request: "yes" if request.policy == "critic" else "42", tokenizer)
    """

    def __init__(
        self, behaviour: Behaviour, tokenizer: PreTrainedTokenizerBase, *, logprob: float = -1.0,
        order: Callable[[list[int]], list[int]] = list,
    ) -> None:  # fmt: skip
        self.requests: list[Request] = []
        """Everything that was asked, in order; a request's number is its place."""
        self._behaviour = behaviour
        self._tokenizer = tokenizer
        self._logprob = logprob
        self._order = order
        self._version = 0
        self._waiting: list[int] = []

    @property
    def stats(self) -> RolloutStats:
        """Counts of requests and their prompt tokens."""
        return RolloutStats(
            requests=len(self.requests), prompt_tokens=sum(len(request.prompt_ids) for request in self.requests)
        )  # fmt: skip

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """Stamp completions with `version` from now on."""
        self._version = version
        return ""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue requests."""
        numbers = list(range(len(self.requests), len(self.requests) + len(requests)))
        self.requests += requests
        self._waiting += numbers
        return numbers

    def poll(self) -> list[tuple[int, Completion]]:
        """End those of the waiting requests that `order` picks."""
        ended = self._order(self._waiting) if self._waiting else []
        self._waiting = [number for number in self._waiting if number not in ended]
        return [(number, self._complete(self.requests[number])) for number in ended]

    def cancel(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def _complete(self, request: Request) -> Completion:
        answer = self._behaviour(request)
        if isinstance(answer, Completion):
            return replace(answer, policy_version=self._version)
        sampling = request.sampling
        ids = (*self._tokenizer.encode(answer, add_special_tokens=False), *sampling.stop_ids[:1])
        kept = ids[: sampling.max_new_tokens]
        return Completion(
            token_ids=kept, logprobs=(self._logprob,) * len(kept),
            text=self._tokenizer.batch_decode([list(kept)], skip_special_tokens=True)[0],
            finish="stop" if len(kept) == len(ids) else "length", policy_version=self._version,
        )  # fmt: skip
