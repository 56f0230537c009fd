"""The one loop that talks to agents. An episode is a generator: it yields requests and is sent their completions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, TypeAlias, TypeVar

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import Produces
from mas_hpc.agents.template import Template
from mas_hpc.orchestration.sampling import Sampling, choose, derive_seed
from mas_hpc.orchestration.topology import Topology
from mas_hpc.rollout.engine import Completion, Request, SamplingParams
from mas_hpc.types import Message, Span, Task, Turn

Result = TypeVar("Result")
Steps: TypeAlias = Generator[list[Request], list[Completion], Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Agents by name, who speaks when, and the dialect that they share.

    Example: Team(agents={"solver": solver}, topology=Single(agent="solver"), template=template)
    """

    agents: Mapping[str, Agent]
    topology: Topology
    template: Template

    def answer(self, path: Sequence[Turn]) -> str | None:
        """The team's answer, as the topology takes it from the turns whose role gives one; None when it is unreadable."""
        return self.topology.answer([turn for turn in path if self.agents[turn.agent].role.produces == "answer"])

    @property
    def roles(self) -> dict[str, Produces]:
        """What each agent's role gives."""
        return {name: agent.role.produces for name, agent in self.agents.items()}

    def prompt(self, task: Task, agent: Agent, path: Sequence[Turn]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        """What `agent` reads in this state, as token ids and as spans of who wrote them."""
        seen = agent.view(path, self.agents)
        if agent.sees == "references" and seen:
            runs = self.template.references(task, agent, seen)
            return tuple(chain.from_iterable(ids for _, ids in runs)), tuple((policy, len(ids)) for policy, ids in runs)
        speakers = [*(self.agents[turn.agent] for turn in seen), agent]
        ids = list(self.template.opening(task, speakers[0]))
        spans: list[Span] = [("", len(ids))]
        for turn, following in zip(seen, speakers[1:], strict=True):
            cue = self.template.cue(task, following, turn)
            ids += [*turn.completion_ids, *cue]
            spans += [(turn.policy, len(turn.completion_ids)), ("", len(cue))]
        return tuple(ids), tuple(spans)

    def conversation(self, task: Task, agent: Agent, path: Sequence[Turn]) -> str | tuple[Message, ...]:
        """What `prompt` encodes, as rows of data sets hold it."""
        seen = agent.view(path, self.agents)
        return self.template.conversation(task, agent, [self.agents[turn.agent] for turn in seen], seen)


class Judge(Protocol):
    """Ground truth for rewards: knows the task's answer, never asks a model."""

    def score(self, task: Task, team: Team, path: Sequence[Turn], turn: Turn) -> Turn:
        """Return the turn with its truth and local reward."""
        ...

    def outcome(self, task: Task, answer: str | None) -> float:
        """1.0 for a right team answer, else 0.0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """How an episode is played: fixed for all episodes of a batch.

    Example: Play(team=team, sampling=Sampling(temperature=1.0), judge=judge, seed=0)
    """

    team: Team
    sampling: Sampling
    judge: Judge
    seed: int
    step: int = 0
    """Training step that it is collected at; for the record."""
    label: str = ""
    """What it is collected for; for the record."""


def play(
    task: Task, how: Play, turns: list[Turn], *, path: Sequence[Turn] = (), round_state: Sequence[Turn] = (),
    speaking: Sequence[str] = (), origin: str = "", counterfactual: bool = False,
) -> Steps[tuple[Turn, ...]]:  # fmt: skip
    """Continue from `path` until nobody speaks; return the whole committed path, and append every turn to `turns`.

    At each state every speaker is sampled `group_size` times, scored, and one sibling is committed. Where `path` ends inside
    a round, `speaking` are those of it who have yet to speak, and `round_state` is what they read.
    """
    origin = origin or f"{task.id}/"
    while speakers := tuple(speaking) or how.team.topology.next_speakers(path):
        state = round_state if speaking else path
        groups = [ask(task, how, how.team.agents[name], state, origin, len(path) + i) for i, name in enumerate(speakers)]
        completions = iter((yield [request for _, requests in groups for request in requests]))
        for number, (drafts, _) in enumerate(groups):
            filled = [fill(draft, next(completions), how.team) for draft in drafts]
            siblings = [how.judge.score(task, how.team, state, turn) for turn in filled]
            if how.sampling.team_rollouts and how.sampling.group_size > 1:
                siblings = yield from _value(task, how, turns, path, siblings, state, speakers[number + 1 :])
            siblings = [
                replace(turn, counterfactual=counterfactual, reward=_reward(turn, how.sampling.alpha)) for turn in siblings
            ]
            chosen = choose(siblings, how.sampling.commit, siblings[0].seed)
            siblings[chosen] = replace(siblings[chosen], committed=not counterfactual)
            turns += siblings
            path = (*path, siblings[chosen])
        speaking = ()
    return tuple(path)


def ask(
    task: Task, how: Play, agent: Agent, path: Sequence[Turn], origin: str, index: int, *, number: int | None = None
) -> tuple[list[Turn], list[Request]]:  # fmt: skip
    """Draft turns and requests for the siblings of one state. Seeds are named by `number`, which is the index if not given."""
    prompt_ids, prompt_spans = how.team.prompt(task, agent, path)
    drafts, requests = [], []
    for sibling in range(how.sampling.group_size):
        seed = derive_seed(how.seed, origin, index if number is None else number, agent.name, sibling)
        drafts.append(
            Turn(
                id=f"{origin}{index}-{agent.name}-{sibling}", parent=path[-1].id if path else None, task_id=task.id,
                agent=agent.name, policy=agent.policy, index=index, sibling=sibling, seed=seed, prompt_ids=prompt_ids,
                prompt_spans=prompt_spans, completion_ids=(), behavior_logprobs=(), text="", finish="error",
            )
        )  # fmt: skip
        sampling = SamplingParams(
            max_new_tokens=how.team.template.limit(task, agent), temperature=how.sampling.temperature, top_p=how.sampling.top_p,
            top_k=how.sampling.top_k, stop_ids=how.team.template.stop_ids,
        )  # fmt: skip
        requests.append(
            Request(prompt_ids=prompt_ids, prompt_spans=prompt_spans, policy=agent.policy, seed=seed, sampling=sampling)
        )
    return drafts, requests


def fill(draft: Turn, completion: Completion, team: Team) -> Turn:
    """The drafted turn with what was sampled, read by its role's parser."""
    answer, verdict = team.template.read(team.agents[draft.agent], completion.text)
    return replace(
        draft, completion_ids=completion.token_ids, behavior_logprobs=completion.logprobs, text=completion.text,
        answer=answer, verdict=verdict, finish=completion.finish, error=completion.error,
        policy_version=completion.policy_version, wall_s=completion.wall_s,
    )  # fmt: skip


def _reward(turn: Turn, alpha: float) -> float | None:
    if turn.local_reward is None or turn.finish == "error":
        return None
    return turn.local_reward + alpha * (turn.team_reward or 0.0)


def _value(
    task: Task, how: Play, turns: list[Turn], path: Sequence[Turn], siblings: Sequence[Turn], state: Sequence[Turn],
    speaking: Sequence[str],
) -> Steps[list[Turn]]:  # fmt: skip
    """Team reward of each sibling: mean outcome of `team_rollouts` episodes continued from it, the rest of its round first."""
    repeats = how.sampling.team_rollouts
    onward = replace(how, sampling=how.sampling.path_only)
    ends = yield from parallel(
        [
            play(
                task,
                onward,
                turns,
                path=(*path, turn),
                round_state=state,
                speaking=speaking,
                origin=f"{turn.id}~{repeat}/",
                counterfactual=True,
            )
            for turn in siblings
            for repeat in range(repeats)
        ]
    )
    outcomes = [how.judge.outcome(task, how.team.answer(end)) for end in ends]
    return [
        replace(turn, team_reward=sum(outcomes[i * repeats : (i + 1) * repeats]) / repeats) for i, turn in enumerate(siblings)
    ]


def parallel(games: Sequence[Steps[Result]], *, on_end: Callable[[int, Result], None] | None = None) -> Steps[list[Result]]:
    """Advance several generators as one: their requests are joined, and all go on when all of these are answered."""
    results: dict[int, Result] = {}
    asked: dict[int, list[Request]] = {}

    def advance(number: int, completions: list[Completion] | None) -> None:
        try:
            asked[number] = games[number].send(completions) if completions is not None else next(games[number])
        except StopIteration as end:
            asked.pop(number, None)
            results[number] = end.value
            if on_end:
                on_end(number, end.value)

    for number in range(len(games)):
        advance(number, None)
    while asked:
        live = list(asked)
        completions = iter((yield [request for number in live for request in asked[number]]))
        for number in live:
            advance(number, [next(completions) for _ in asked[number]])
    return [results[number] for number in range(len(games))]
