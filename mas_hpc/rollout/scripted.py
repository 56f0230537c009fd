"""An engine with behaviour instead of a model: for tests of everything that talks to engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mas_hpc.rollout.engine import Completion, Request

Behaviour = Callable[[Request], Completion | str]


class ScriptedEngine:
    """Answers each request with what `behaviour` makes of it; implements RolloutEngine.

    A text is encoded, ended by the request's first stop id (if any) and cut at max_new_tokens; every token gets the
    log-prob `logprob`. A Completion is returned as it is, but for its policy version.
    Example: ScriptedEngine(lambda request: "yes" if request.policy == "critic" else "42", tokenizer)
    """

    def __init__(self, behaviour: Behaviour, tokenizer: PreTrainedTokenizerBase, *, logprob: float = -1.0) -> None:
        self.requests: list[Request] = []
        """Everything that was asked, in order."""
        self._behaviour = behaviour
        self._tokenizer = tokenizer
        self._logprob = logprob
        self._version = 0

    def load(self, *, version: int) -> None:
        """Stamp completions with `version` from now on."""
        self._version = version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion a request, in order."""
        self.requests += requests
        return [self._complete(request) for request in requests]

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
