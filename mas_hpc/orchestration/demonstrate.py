"""Transcripts for the warm start: the team's own episode, its turns written by a demonstrator instead of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

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


class Demonstrator(Protocol):
    """Writes turns without a model."""

    def __call__(self, task: Task, agent: Agent, path: tuple[Turn, ...], rng: Random) -> Draft:
        """The text of one turn."""
        ...

    def answer(self, task: Task, rng: Random, *, right: bool) -> str:
        """The text of an answer that is right, or one that is wrong."""
        ...


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
            writes = team.agents[name].role.produces != "text"  # nobody can say what a free text should be
            draft = demonstrator(task, team.agents[name], state, rng) if writes else Draft(text="", trained=False)
            turn = write_turn(task, team, name, state, draft.text)
            path.append(turn)
            if draft.trained:
                samples.append(
                    Sample(
                        id=turn.id, tree=f"{task.id}#{seed}", agent=name, policy=turn.policy, prompt_ids=turn.prompt_ids,
                        prompt_spans=turn.prompt_spans, completion_ids=turn.completion_ids,
                    )
                )  # fmt: skip
    return samples


def plant(task: Task, team: Team, demonstrator: Demonstrator, judge: str, *, right: bool, seed: int) -> tuple[Turn, ...]:
    """The turns before agent `judge` first speaks: wrong answers that are truly judged, then a right or a wrong one.

    Empty when `judge` does not speak directly after an answer.
    """
    rng = Random(seed)
    path: list[Turn] = []
    while (speakers := team.topology.next_speakers(path)) and speakers[0] != judge:
        agent = team.agents[speakers[0]]
        answers = agent.role.produces == "answer"
        text = demonstrator.answer(task, rng, right=False) if answers else demonstrator(task, agent, tuple(path), rng).text
        path.append(write_turn(task, team, agent.name, path, text))
    if not speakers or not path or path[-1].answer is None:
        return ()
    *earlier, last = path
    return (*earlier, write_turn(task, team, last.agent, earlier, demonstrator.answer(task, rng, right=right)))


def write_turn(task: Task, team: Team, name: str, path: Sequence[Turn], text: str) -> Turn:
    """A committed turn with a given text, as if the agent had written it from this state."""
    agent = team.agents[name]
    prompt_ids, prompt_spans = team.prompt(task, agent, path)
    answer, verdict = team.template.read(agent, text)
    return Turn(
        id=f"{task.id}/{len(path)}-{name}-demonstrated", parent=path[-1].id if path else None, task_id=task.id, agent=name,
        policy=agent.policy, index=len(path), prompt_ids=prompt_ids, prompt_spans=prompt_spans,
        completion_ids=team.template.write(text), behavior_logprobs=(), text=text, answer=answer, verdict=verdict,
        finish="stop", committed=True,
    )  # fmt: skip
