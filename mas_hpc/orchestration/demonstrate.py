"""Transcripts for the warm start: the team's own episode, its turns written by a demonstrator instead of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mas_hpc.agents.agent import Agent
from mas_hpc.orchestration.episode import Team
from mas_hpc.types import Sample, Task, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a demonstrator writes for one turn.

    Example: Draft(text="01230", trained=False) is a planted error: later roles read it, nobody learns to write it
    """

    text: str
    trained: bool = True


Demonstrator = Callable[[Task, Agent, tuple[Turn, ...], Random], Draft]


def demonstrate(task: Task, team: Team, demonstrator: Demonstrator, seed: int) -> list[Sample]:
    """Play one episode with the demonstrator; return a sample for every turn that is trained on.

    Prompts, cues and parsers are the team's own, so that training and rollout see the same tokens.
    """
    rng = Random(seed)
    path: list[Turn] = []
    samples = []
    while speakers := team.topology.next_speakers(path):
        state = tuple(path)
        for name in speakers:
            agent = team.agents[name]
            draft = demonstrator(task, agent, state, rng)
            prompt_ids, prompt_spans = team.prompt(task, agent, state)
            answer, verdict = team.template.read(agent, draft.text)
            turn = Turn(
                id=f"{task.id}/{len(path)}-{name}", parent=path[-1].id if path else None, task_id=task.id, agent=name,
                policy=agent.policy, index=len(path), prompt_ids=prompt_ids, prompt_spans=prompt_spans,
                completion_ids=team.template.write(draft.text), behavior_logprobs=(), text=draft.text,
                answer=answer, verdict=verdict, finish="stop", committed=True,
            )  # fmt: skip
            path.append(turn)
            if draft.trained:
                samples.append(
                    Sample(
                        id=turn.id, tree=f"{task.id}#{seed}", agent=name, policy=agent.policy, prompt_ids=prompt_ids,
                        prompt_spans=prompt_spans, completion_ids=turn.completion_ids,
                    )
                )  # fmt: skip
    return samples
