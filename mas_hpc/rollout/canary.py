"""A few greedy tokens before a rollout step: does the engine answer as the trainer's weights would?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mas_hpc.errors import RolloutError
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.types import Span

Score = Callable[[Sequence[Request], Sequence[Completion]], Sequence[Sequence[float]]]
"""The trainer's own log-probs (temperature 1) of the completions' tokens, from its own forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """Refuses a step whose weights did not arrive.

    The checksum of WeightSync says that the bytes arrived; this says that the engine computes with them: that they are
    under the right names, adapters are scaled alike, nothing derived from older weights is left. An update that moves no
    log-prob by more than `tolerance` cannot be seen here.
    Example: Canary(prompt_ids=(5, 6, 7)).check(engine, name="rank 1", version=3, policies=("solver",), score=score)
    """

    prompt_ids: tuple[int, ...]
    num_tokens: int = 8
    tolerance: float = 1e-4
    """Largest difference of a log-prob, in nats: 1e-4 is for float32 on both sides; lower precision needs a wider one."""

    def requests(self, policies: Sequence[str]) -> list[Request]:
        """What is asked: one greedy completion a policy, the prompt written by nobody."""
        spans: tuple[Span, ...] = (("", len(self.prompt_ids)),)
        sampling = SamplingParams(max_new_tokens=self.num_tokens, temperature=0.0)
        return [
            Request(prompt_ids=self.prompt_ids, prompt_spans=spans, policy=policy, seed=0, sampling=sampling)
            for policy in policies
        ]

    def check(self, engine: RolloutEngine, *, name: str, version: int, policies: Sequence[str], score: Score) -> None:
        """Ask the engine, which is idle, and compare. Raises RolloutError naming version, engine, policy and difference."""
        requests = self.requests(policies)
        completions = engine.generate(requests)
        for request, completion in zip(requests, completions, strict=True):
            if completion.finish == "error" or not completion.token_ids:
                raise RolloutError(
                    f"engine of {name}, policy {request.policy!r}, version {version}: no answer to the canary prompt of "
                    f"{len(self.prompt_ids)} tokens: {completion.error or 'it is empty'}"
                )
            if completion.policy_version != version:
                raise RolloutError(
                    f"engine of {name}, policy {request.policy!r}: it serves version {completion.policy_version}, expected "
                    f"{version}; the last weights did not reach it: look for the first error of its weight sync"
                )
        for request, completion, expected in zip(requests, completions, score(requests, completions), strict=True):
            self._compare(completion, expected, f"engine of {name}, policy {request.policy!r}, version {version}")

    def _compare(self, completion: Completion, expected: Sequence[float], who: str) -> None:
        pairs = list(zip(completion.logprobs, expected, strict=True))
        differences = [abs(served - trained) for served, trained in pairs]
        wrong = [index for index, difference in enumerate(differences) if not difference <= self.tolerance]  # also nan
        if wrong:
            served, trained = pairs[wrong[0]]
            raise RolloutError(
                f"{who}: token {wrong[0]} of the canary has log-prob {served:.6f}, the trainer's weights give {trained:.6f} "
                f"(difference {differences[wrong[0]]:.2g}, allowed {self.tolerance:g}); it serves other weights"
            )
