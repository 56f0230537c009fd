"""Turns of a recorded trace sampled again from their own prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mas_hpc.agents.agent import Agent
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.types import Turn


def replay(
    engine: RolloutEngine, turns: Sequence[Turn], agents: Mapping[str, Agent], sampling: Sampling, stop_ids: tuple[int, ...]
) -> list[Completion]:
    """Ask the engine for the same completions again: equal tokens show that the record is reproducible."""
    return engine.generate(
        [
            Request(
                prompt_ids=turn.prompt_ids,
                prompt_spans=turn.prompt_spans,
                policy=turn.policy,
                seed=turn.seed,
                sampling=SamplingParams(
                    max_new_tokens=agents[turn.agent].max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    stop_ids=stop_ids,
                ),
            )
            for turn in turns
        ]
    )
