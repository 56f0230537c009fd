"""Branches on request: what a team would have achieved without some agents, or from some message on.

These are the value functions of credit. A question to one is a coalition of agents, or a number of messages that are kept.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from typing import Literal, TypeAlias

from mas_hpc.orchestration.episode import Play, Result, Steps, Team, ask, fill, parallel
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Topology
from mas_hpc.rollout.engine import BASE_POLICY, Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.types import Task, Turn, rounds_of

ValueFunction = Literal["removal", "replacement", "masked", "resample"]
Question: TypeAlias = frozenset[str] | int
"""A coalition of agents, or how many messages of the recorded path are kept."""
Outcomes: TypeAlias = MutableMapping[tuple[Question, int], float]
"""Outcomes by question and number of the replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """How the questions about one recorded path are answered.

    removal: the absent agents are skipped and all others speak anew. replacement: the absent agents are spoken for by the base
    policy. masked: the absent agents are skipped; messages of the present ones are kept as long as they read what they read
    then, and are sampled anew from there. resample: nobody is absent; the messages before the first one of an absent agent are
    kept, it and all after it are sampled anew (C3's manner, arXiv 2603.06859). Kept prefixes (numbers) are continued by the
    whole team under every value function.

    Seeds are named by agent and by how often it has spoken, so that coalitions that share their first agents ask for the very
    same completions, and an absent agent leaves the random numbers of the others alone.
    Example: Counterfactual(task=task, path=trace.path, how=play, value="masked", num_replays=4)
    """

    task: Task
    path: tuple[Turn, ...]
    how: Play
    value: ValueFunction
    num_replays: int

    def outcome(self, question: Question, replay: int) -> Steps[float]:
        """1.0 or 0.0, or nan where a turn failed: a missing value, not a wrong answer."""
        team, kept = self._scenario(question)
        end = yield from continued(self.task, replace(self.how, team=team), kept, origin=f"{self.task.id}~{replay}/")
        if any(turn.finish == "error" for turn in end):
            return math.nan
        return self.how.judge.outcome(self.task, team.answer(end))

    def mean(self, question: Question, known: Outcomes) -> Steps[float]:
        """Mean outcome over the replays that did not fail; nan if all did. Outcomes in `known` are not sampled again."""
        missing = [replay for replay in range(self.num_replays) if (question, replay) not in known]

        def end(number: int, outcome: float) -> None:
            known[question, missing[number]] = outcome

        yield from parallel([self.outcome(question, replay) for replay in missing], on_end=end)
        outcomes = [known[question, replay] for replay in range(self.num_replays)]
        present = [outcome for outcome in outcomes if not math.isnan(outcome)]
        return fmean(present) if present else math.nan

    def canonical(self, question: Question) -> Question:
        """One question for all that mean the same play: without agents who would not speak, kept prefixes by length."""
        if isinstance(question, int) or self.value == "replacement":
            return question
        if self.value == "resample":
            _, kept = self._scenario(question)
            return len(kept) if kept == self.path[: len(kept)] else frozenset(turn.agent for turn in kept)
        for name in sorted(question):
            if self._restricted(question - {name}) == self._restricted(question):
                question -= {name}
        return question

    def alternatives(self, place: int, count: int) -> Steps[list[Turn]]:
        """`count` new messages at the state of message `place`."""
        turn, how = self.path[place], replace(self.how, sampling=replace(self.how.sampling, group_size=count))
        agent = how.team.agents[turn.agent]
        drafts, requests = ask(self.task, how, agent, self.state(place), f"{self.task.id}~instead/", place)
        completions = yield requests
        return [fill(draft, completion, how.team) for draft, completion in zip(drafts, completions, strict=True)]

    def state(self, place: int) -> tuple[Turn, ...]:
        """The turns that the author of message `place` could read: those of the rounds before its own."""
        ends = accumulate(map(len, rounds_of(self.path)))
        return self.path[: max((end for end in ends if end <= place), default=0)]

    def _scenario(self, question: Question) -> tuple[Team, tuple[Turn, ...]]:
        """Who plays, and which recorded turns are kept."""
        team = self.how.team
        if isinstance(question, int):
            return team, self.path[:question]
        kept = tuple(turn for turn in self.path if turn.agent in question)
        if self.value == "resample":
            return team, tuple(turn for turn in _until_absent(self.path, question) if turn.agent in question)
        if self.value == "replacement":
            agents = {
                name: agent if name in question else replace(agent, policy=BASE_POLICY) for name, agent in team.agents.items()
            }
            return replace(team, agents=agents), ()
        return replace(team, topology=self._restricted(question)), kept if self.value == "masked" else ()

    def _restricted(self, present: frozenset[str]) -> Topology:
        agents = self.how.team.agents
        answering = frozenset(name for name, agent in agents.items() if agent.role.produces == "answer")
        return self.how.team.topology.restricted(present, answering)


def _until_absent(path: Sequence[Turn], present: frozenset[str]) -> list[Turn]:
    """The rounds up to and including the first in which somebody who is not present speaks."""
    turns: list[Turn] = []
    for members in rounds_of(path):
        turns += members
        if any(turn.agent not in present for turn in members):
            break
    return turns


def continued(task: Task, how: Play, kept: Sequence[Turn], *, origin: str) -> Steps[tuple[Turn, ...]]:
    """Play one path. A turn in `kept` stands for what its agent would write wherever it reads the same prompt.

    It continues the turn that its round continues here, or the round would fall apart into kept and fresh turns.
    """
    waiting: dict[tuple[str, tuple[int, ...]], list[Turn]] = defaultdict(list)
    for turn in kept:
        waiting[turn.agent, turn.prompt_ids].append(turn)
    spoken: Counter[str] = Counter()
    path: tuple[Turn, ...] = ()
    while speakers := how.team.topology.next_speakers(path):
        entries: list[tuple[Turn, Request, Turn | None]] = []
        for place, name in enumerate(speakers, len(path)):
            [draft], [request] = ask(task, how, how.team.agents[name], path, origin, place, number=spoken[name])
            recorded = waiting[name, draft.prompt_ids]
            entries.append((draft, request, replace(recorded.pop(0), parent=draft.parent) if recorded else None))
            spoken[name] += 1
        requests = [request for _, request, recorded in entries if recorded is None]
        completions = iter((yield requests) if requests else ())
        path += tuple(recorded or fill(draft, next(completions), how.team) for draft, _, recorded in entries)
    return path


def valued(
    estimate: Generator[Sequence[Question], Sequence[float], Result], value: Callable[[Question], Steps[float]],
    canonical: Callable[[Question], Question] = lambda question: question,
) -> Steps[Result | None]:  # fmt: skip
    """Answer an estimate's questions by episodes; None, and the estimate is given up, where a value is missing (nan).

    Questions with one canonical form are answered once a batch.
    """
    try:
        questions = next(estimate)
        while True:
            forms = [canonical(question) for question in questions]
            distinct = list(dict.fromkeys(forms))
            found = yield from parallel([value(question) for question in distinct])
            by_form = dict(zip(distinct, found, strict=True))
            values = [by_form[form] for form in forms]
            if any(map(math.isnan, values)):
                estimate.close()
                return None
            questions = estimate.send(values)
    except StopIteration as end:
        return end.value


def shared(steps: Steps[Result], known: MutableMapping[Request, Completion]) -> Steps[Result]:
    """Serve equal requests once: coalitions that share their first agents are one path in the tree until they part."""
    try:
        requests = next(steps)
        while True:
            fresh = list(dict.fromkeys(request for request in requests if request not in known))
            if fresh:
                known.update(zip(fresh, (yield fresh), strict=True))
            requests = steps.send([known[request] for request in requests])
    except StopIteration as end:
        return end.value


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
