"""Many episodes at once: independent ones of a question, in the order of the tasks, however few are live."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.rollout.engine import Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, Trace


def lookup(request: Request) -> str:
    """A solver that is right for even seeds."""
    return {"solver": ("012", "111")[request.seed % 2], "critic": "!!!-", "reviser": "012", "verifier": "===+"}[request.policy]


def play(team: Team, tasks: list[Task], tokenizer, sampling: Sampling, *, max_live: int = 4, **options) -> list[Trace]:
    how = Play(team=team, sampling=sampling, judge=VerifiableJudge(break_penalty=0.0), seed=0)
    engine = ScriptedEngine(lookup, tokenizer)
    return collect(engine, tasks, how, max_live=max_live, on_trace=options.pop("on_trace", lambda trace: None), **options)


def seeds(trace: Trace) -> list[int]:
    return [turn.seed for turn in trace.turns]


@pytest.fixture
def tasks(task: Task) -> list[Task]:
    return [replace(task, id=name) for name in ("p", "q", "r")]


def test_episodes_of_a_question_follow_each_other_and_are_sampled_apart(team: Team, tasks, tokenizer) -> None:
    traces = play(team, tasks, tokenizer, Sampling(temperature=1.0, episodes=4))
    assert [trace.task.id for trace in traces] == ["p"] * 4 + ["q"] * 4 + ["r"] * 4
    assert len({tuple(seeds(trace)) for trace in traces}) == 12
    assert len({turn.id for trace in traces for turn in trace.turns}) == 12 * 4
    assert {trace.path[0].text for trace in traces} == {"012", "111"}
    assert all(turn.parent in (None, *(t.id for t in trace.turns)) for trace in traces for turn in trace.turns)


def test_the_first_of_several_episodes_is_the_one_that_is_played_alone(team: Team, tasks, tokenizer) -> None:
    alone = play(team, tasks, tokenizer, Sampling(temperature=1.0))
    group = play(team, tasks, tokenizer, Sampling(temperature=1.0, episodes=3))
    assert group[::3] == alone


@pytest.mark.parametrize("max_live", [1, 2, 100])
def test_how_many_are_live_changes_nothing(team: Team, tasks, tokenizer, max_live: int) -> None:
    sampling, ended = Sampling(temperature=1.0, episodes=3), []
    expected = play(team, tasks, tokenizer, sampling)
    traces = play(team, tasks, tokenizer, sampling, max_live=max_live, on_trace=ended.append)
    assert traces == expected and sorted(map(id, ended)) == sorted(map(id, traces))


def test_episodes_that_continue_a_turn_continue_the_one_of_their_question(team: Team, tasks, tokenizer) -> None:
    starts = [trace.path[:1] for trace in play(team, tasks, tokenizer, Sampling(temperature=1.0))]
    traces = play(team, tasks, tokenizer, Sampling(temperature=1.0, episodes=2), starts=starts)
    assert [trace.path[0].id for trace in traces] == [start[0].id for start in starts for _ in range(2)]
    assert seeds(traces[0])[1:] != seeds(traces[1])[1:]


def test_continuations_are_single_episodes() -> None:
    assert Sampling(temperature=0.7, episodes=4, group_size=2).path_only == Sampling(temperature=0.7)
