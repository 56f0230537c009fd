"""What a rollout engine is: requests in, completions with the log-probs that were really sampled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mas_hpc.types import Finish, Span

BASE_POLICY = "base"
"""The model without adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is drawn. temperature=0 is greedy, and log-probs are then those of temperature 1.

    Example: SamplingParams(max_new_tokens=64, temperature=0.7, stop_ids=(2,))
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens that are kept; 0 keeps all."""
    stop_ids: tuple[int, ...] = ()
    """Sampling one of them ends the completion; it is the last completion token."""
    stop_strings: tuple[str, ...] = ()
    """The completion ends with the token that completes one of them in the decoded text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. The same request gives the same tokens whatever else is in the batch.

    Example: Request(prompt_ids=(1, 5, 6), prompt_spans=(("", 3),), policy="solver", seed=7, sampling=params)
    """

    prompt_ids: tuple[int, ...]
    prompt_spans: tuple[Span, ...]
    """Who wrote the prompt: decides the adapter of each prompt token under `speaker` scope."""
    policy: str
    seed: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one request. A failure is a value: finish="error" with the reason, never a lost row.

    Example: Completion(token_ids=(9, 2), logprobs=(-0.1, -0.7), text="42", finish="stop")
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log, of the distribution after temperature, top-k and top-p: the one that was sampled from."""
    text: str
    """Decoded without special tokens."""
    finish: Finish
    error: str = ""
    policy_version: int = 0
    wall_s: float = 0.0
    """Wall time of the engine call that served it."""


class RolloutEngine(Protocol):
    """Serves completions. Implementations: native (any torch device) and scripted (a fake with behaviour)."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion a request, in order. Raises RolloutError when a policy is unknown."""
        ...

    def load(self, *, version: int) -> None:
        """Serve the weights of `version` from the next request on."""
        ...
