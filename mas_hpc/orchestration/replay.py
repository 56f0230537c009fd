"""Turns of a recorded trace sampled again from their own prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence

from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.types import Task, Turn


def replay(engine: RolloutEngine, task: Task, turns: Sequence[Turn], team: Team, sampling: Sampling) -> list[Completion]:
    """Ask the engine for the same completions again: equal tokens show that the record is reproducible."""
    return engine.generate(
        [
            Request(
                prompt_ids=turn.prompt_ids,
                prompt_spans=turn.prompt_spans,
                policy=turn.policy,
                seed=turn.seed,
                sampling=SamplingParams(
                    max_new_tokens=team.template.limit(task, team.agents[turn.agent]),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    stop_ids=team.template.stop_ids,
                ),
            )
            for turn in turns
        ]
    )
