"""Who goes on when: at once after its own answers, or in waves; and whose jobs are done here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from mas_hpc.errors import RolloutError
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Steps, Team
from mas_hpc.orchestration.events import InOrder, serve_all
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, Trace
from tests.orchestration.conftest import chance

Order = Callable[[list[int]], list[int]]


@pytest.fixture
def tasks(task: Task) -> list[Task]:
    return [replace(task, id=name) for name in "pqrs"]


def play_of(team: Team, **sampling) -> Play:
    return Play(team=team, sampling=Sampling(temperature=1.0, **sampling), judge=VerifiableJudge(), seed=0)


def last_first(waiting: list[int]) -> list[int]:
    """The newest request ends first, one a poll: the oldest is the longest of all."""
    return waiting[-1:]


def spoken(engine: ScriptedEngine, traces: list[Trace]) -> list[str]:
    """Whose turns were asked for, in order: the question's name and the turn's index."""
    names = {turn.seed: f"{trace.task.id}{turn.index}" for trace in traces for turn in trace.turns}
    return [names[request.seed] for request in engine.requests]


def test_no_episode_waits_for_the_long_turn_of_another(pipeline: Team, tasks, tokenizer) -> None:
    engine, ended = ScriptedEngine(chance, tokenizer, order=last_first), []
    traces = collect(engine, tasks, play_of(pipeline), max_live=2, on_trace=ended.append)
    assert [trace.task.id for trace in ended] == ["q", "r", "s", "p"]
    assert " ".join(spoken(engine, traces)) == "p0 q0 q1 q2 q3 r0 r1 r2 r3 s0 s1 s2 s3 p1 p2 p3"


def test_waves_wait_for_the_longest_turn_and_are_filled_up_between(pipeline: Team, tasks, tokenizer) -> None:
    engine = ScriptedEngine(chance, tokenizer, order=last_first)
    traces = collect(engine, tasks, play_of(pipeline), max_live=3, schedule="waves")
    first = [f"{task}{index}" for index in range(4) for task in "pqr"]
    assert spoken(engine, traces) == [*first, "s0", "s1", "s2", "s3"]


def shuffled(seed: int) -> Order:
    draw = Random(seed)
    return lambda waiting: draw.sample(waiting, draw.randint(0, len(waiting)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("schedule", ["events", "waves"])
def test_traces_depend_neither_on_the_order_of_completion_nor_on_the_schedule(
    team: Team, tasks, tokenizer, schedule, seed: int
) -> None:
    how = play_of(team, group_size=2, team_rollouts=2, alpha=0.5, episodes=2)
    expected = collect(ScriptedEngine(chance, tokenizer), tasks, how, max_live=100)
    assert len({trace.reward for trace in expected}) == 2
    engine = ScriptedEngine(chance, tokenizer, order=shuffled(seed))
    assert collect(engine, tasks, how, max_live=3, schedule=schedule) == expected


@pytest.mark.parametrize("schedule", ["events", "waves"])
def test_no_more_are_live_than_allowed(pipeline: Team, tasks, tokenizer, schedule) -> None:
    seen: list[int] = []

    def order(waiting: list[int]) -> list[int]:
        seen.append(len(waiting))
        return waiting[:1]

    collect(
        ScriptedEngine(chance, tokenizer, order=order), tasks, play_of(pipeline, group_size=2), max_live=2, schedule=schedule
    )
    assert max(seen) == 4  # two episodes of two siblings


class OfTwoRanks(InOrder):
    """Jobs of which another rank does the odd ones, and is sooner with job `lost`; it is done after `idle` looks."""

    def __init__(self, count: int, *, lost: int | None = None, idle: int = 0) -> None:
        super().__init__(range(0, count, 2))
        self._lost, self._idle = lost, idle

    def finish(self, job: int, result) -> bool:
        super().finish(job, result)
        return job != self._lost

    @property
    def exhausted(self) -> bool:
        self._idle -= super().exhausted
        return super().exhausted and self._idle < 0


def test_only_the_jobs_that_were_taken_are_played_and_only_those_that_count_are_kept(team: Team, tasks, tokenizer) -> None:
    ended: list[Trace] = []
    traces = collect(
        ScriptedEngine(chance, tokenizer), tasks, play_of(team), max_live=4, jobs=OfTwoRanks(4, lost=2), on_trace=ended.append
    )
    assert traces == ended and [trace.task.id for trace in traces] == ["p"]


def test_jobs_are_episodes_in_the_order_of_the_tasks(team: Team, tasks, tokenizer) -> None:
    how = play_of(team, episodes=3)
    every = collect(ScriptedEngine(chance, tokenizer), tasks, how, max_live=4)
    assert collect(ScriptedEngine(chance, tokenizer), tasks, how, max_live=4, jobs=OfTwoRanks(12)) == every[::2]


class Counting(ScriptedEngine):
    polls = 0

    def poll(self):
        self.polls += 1
        return super().poll()


def test_the_engine_works_for_others_until_they_are_done(pipeline: Team, tasks, tokenizer) -> None:
    engine = Counting(chance, tokenizer)
    collect(engine, tasks[:1], play_of(pipeline), max_live=4, jobs=OfTwoRanks(1, idle=10))
    assert engine.polls == 4 + 10


def test_what_others_have_finished_meanwhile_is_dropped(pipeline: Team, tasks, tokenizer) -> None:
    class TakenOver(InOrder):
        looks = 0

        @property
        def exhausted(self) -> bool:
            self.looks += 1
            return self.looks > 3

    held = [True]
    engine = ScriptedEngine(chance, tokenizer, order=lambda waiting: [] if held[0] else waiting)
    assert collect(engine, tasks, play_of(pipeline), max_live=2, jobs=TakenOver(range(4))) == []
    held[0] = False
    assert len(engine.requests) == 2 and engine.poll() == []


def test_an_interruption_cancels_what_the_engine_has(pipeline: Team, tasks, tokenizer) -> None:
    def interrupted(request: Request) -> str:
        if request.policy == "critic":
            raise KeyboardInterrupt
        return chance(request)

    engine, kept = ScriptedEngine(interrupted, tokenizer, order=lambda waiting: waiting[:1]), []
    with pytest.raises(KeyboardInterrupt):
        collect(engine, tasks, replace(play_of(pipeline), label="train", step=3), max_live=4, on_trace=kept.append)
    assert [(trace.task.id, trace.label, trace.step, len(trace.turns)) for trace in kept] == [
        (name, "train:unfinished", 3, 1) for name in "pqrs"
    ]
    assert engine.poll() == []


def test_an_unknown_policy_is_an_error_before_anything_is_served(pipeline: Team, tasks, tokenizer) -> None:
    class Refusing(ScriptedEngine):
        def submit(self, requests):
            raise RolloutError("policy")

    with pytest.raises(RolloutError):
        collect(Refusing(chance, tokenizer), tasks, play_of(pipeline), max_live=1)


def request(seed: int) -> Request:
    params = SamplingParams(max_new_tokens=9)
    return Request(prompt_ids=(1,), prompt_spans=(("", 1),), policy="p", seed=seed, sampling=params)


def test_generators_of_any_length_get_their_own_answers_in_the_order_asked(tokenizer) -> None:
    def steps(number: int) -> Steps[list[str]]:
        got: list[str] = []
        for length in range(number):  # none at all, then none, one, two ... requests at a time
            answers = yield [request(100 * number + 10 * length + place) for place in range(length)]
            got += [answer.text for answer in answers]
        return got

    engine = ScriptedEngine(lambda asked: f"{asked.seed}", tokenizer, order=last_first)
    assert serve_all(engine, [steps(number) for number in range(4)], max_live=2) == [[], [], ["210"], ["310", "320", "321"]]
    assert serve_all(engine, []) == []
