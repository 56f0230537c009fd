"""What a rollout engine is: requests in, completions with the log-probs that were really sampled out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from mas_hpc.types import BASE_POLICY as BASE_POLICY
from mas_hpc.types import Finish, Span

if TYPE_CHECKING:
    from torch import Tensor

Weights: TypeAlias = "Iterable[tuple[str, str, Tensor]]"
"""(policy, name, tensor): of BASE_POLICY a parameter of the model, of others a tensor of their adapter under PEFT's name."""


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
    """Wall time from submission to the end, waiting for room included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """What an engine has done since it was made; the difference of two is what happened between them."""

    requests: int = 0
    prompt_tokens: int = 0
    """Tokens in the prompts of all requests that were begun; again with what it had, when one was set back for want of room."""
    prefilled_tokens: int = 0
    """Prompt tokens that were run; the rest of prompt_tokens was shared."""
    evicted_tokens: int = 0
    """Tokens whose keys and values were dropped for room."""
    decoded_tokens: int = 0
    """Completion tokens."""
    steps: int = 0
    """Forward passes."""
    row_steps: int = 0
    """Decoded rows of all steps, finished ones that were not dropped yet included."""
    idle_row_steps: int = 0
    """Those of finished rows: wasted."""
    padded_keys: int = 0
    """Keys that decoding attended to as padding, summed over rows and steps."""
    real_keys: int = 0
    """Keys that it attended to for real."""
    peak_kv_bytes: int = 0
    """Most bytes of keys and values at a time; of a difference, that of the later."""
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __sub__(self, earlier: RolloutStats) -> RolloutStats:
        names = [name for name in self.__slots__ if name != "peak_kv_bytes"]
        return RolloutStats(
            peak_kv_bytes=self.peak_kv_bytes, **{name: getattr(self, name) - getattr(earlier, name) for name in names}
        )

    def __add__(self, other: RolloutStats) -> RolloutStats:
        return RolloutStats(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


class RolloutEngine(Protocol):
    """Serves completions. Implementations: native, vllm, scripted, and routers over them.

    Requests are submitted at any time and end in any order; `generate` is submitting and waiting.
    """

    @property
    def stats(self) -> RolloutStats:
        """Totals since the engine was made."""
        ...

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue requests; return their numbers, in order. Raises RolloutError, and queues none, when a policy is unknown."""
        ...

    def poll(self) -> list[tuple[int, Completion]]:
        """Work for a bounded number of steps; return numbers and completions of the requests that have ended since."""
        ...

    def cancel(self) -> None:
        """Forget every request that has not been returned."""
        ...

    def sleep(self) -> None:
        """Give back memory that only requests need, for training to use; none is outstanding. The next request wakes it.

        An engine that cannot keeps it.
        """
        return None

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """Serve `weights` (None: those that the trainer shares with the engine) as `version` from the next request on.

        Called while no request is outstanding. Returns the checksum of what was copied, "" when nothing was.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion a request, in order. Nothing else may be outstanding."""
        served: dict[int, Completion] = {}
        numbers = self.submit(requests)
        try:
            while len(served) < len(numbers):
                served.update(self.poll())
        except BaseException:
            self.cancel()
            raise
        assert served.keys() == set(numbers), "generate needs the engine for itself"
        return [served[number] for number in numbers]
