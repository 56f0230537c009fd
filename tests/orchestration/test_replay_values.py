"""Values of questions: means over the replays that did not fail, known outcomes, each question once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mas_hpc.credit_assignment.estimate import Estimate
from mas_hpc.orchestration.episode import Steps, Team
from mas_hpc.orchestration.events import run as serve
from mas_hpc.orchestration.replay import Outcomes, Question, valued
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import Behaviour, ScriptedEngine
from mas_hpc.types import Task
from tests.orchestration.conftest import EVERYBODY, FAILED, chance, counterfactual, of


def failing(*seeds: int) -> Behaviour:
    """The numbered replays fail: each of them asks the solver for one completion, in order."""
    numbers: dict[int, int] = {}

    def behave(request: Request) -> Completion | str:
        number = numbers.setdefault(request.seed, len(numbers))
        return FAILED if number in seeds else ("012", "111")[number % 2]

    return behave


@pytest.fixture
def alone(team: Team) -> Team:
    """The solver and nobody else."""
    return replace(team, agents={"solver": team.agents["solver"]}, topology=Pipeline(agents=("solver",)))


def test_a_failed_replay_is_a_missing_value_and_the_others_give_the_mean(alone: Team, task: Task, tokenizer) -> None:
    replayed = counterfactual(alone, task, (), "removal", num_replays=4)
    known: Outcomes = {}
    assert serve(ScriptedEngine(failing(0, 3), tokenizer), replayed.mean(of("solver"), known)) == 0.5
    assert [known[of("solver"), replay] for replay in (1, 2)] == [0.0, 1.0]
    assert all(math.isnan(known[of("solver"), replay]) for replay in (0, 3))


def test_when_every_replay_fails_the_value_is_missing_and_the_estimate_is_given_up(
    alone: Team, task: Task, tokenizer
) -> None:  # fmt: skip
    replayed = counterfactual(alone, task, (), "removal", num_replays=2)
    engine = ScriptedEngine(failing(0, 1), tokenizer)
    assert math.isnan(serve(engine, replayed.mean(of("solver"), {})))
    closed: list[bool] = []

    def estimate() -> Estimate[Question, str]:
        try:
            yield [of(), of("solver")]
            return "a number"
        finally:
            closed.append(True)

    engine = ScriptedEngine(failing(0, 1), tokenizer)
    assert serve(engine, valued(estimate(), lambda coalition: replayed.mean(coalition, {}))) is None
    assert closed == [True]


def test_a_turn_that_failed_late_spoils_its_replay(pipeline: Team, task: Task, tokenizer) -> None:
    engine = ScriptedEngine(lambda r: FAILED if r.policy == "critic" else chance(r), tokenizer)
    assert math.isnan(serve(engine, counterfactual(pipeline, task, (), "removal").outcome(EVERYBODY, 0)))
    assert not math.isnan(serve(engine, counterfactual(pipeline, task, (), "removal").outcome(of("solver", "reviser"), 0)))


def test_known_outcomes_are_not_asked_again(alone: Team, task: Task, tokenizer) -> None:
    engine = ScriptedEngine(lambda request: "012", tokenizer)
    replayed = counterfactual(alone, task, (), "removal", num_replays=4)
    known: Outcomes = {(of("solver"), 1): 0.0, (of("solver"), 2): math.nan, (1, 0): 0.0}
    assert serve(engine, replayed.mean(of("solver"), known)) == pytest.approx(2 / 3)
    assert len(engine.requests) == 2, "the first and the last; a failure of this run is known too"
    assert serve(engine, replayed.mean(of("solver"), known)) == pytest.approx(2 / 3)
    assert len(engine.requests) == 2


def test_a_question_keeps_the_seeds_of_its_replays_when_some_are_known(alone: Team, task: Task, tokenizer) -> None:
    fresh, rest = (ScriptedEngine(lambda request: "012", tokenizer) for _ in range(2))
    replayed = counterfactual(alone, task, (), "removal", num_replays=3)
    serve(fresh, replayed.mean(of("solver"), {}))
    serve(rest, replayed.mean(of("solver"), {(of("solver"), 1): 0.0}))
    assert rest.requests == [fresh.requests[0], fresh.requests[2]]


def test_values_may_be_asked_in_several_batches(alone: Team, task: Task, tokenizer) -> None:
    def estimate() -> Estimate[Question, list[float]]:
        first = yield [of("solver"), of()]
        second = yield [of("solver")] if first[0] else [of()]
        return [*first, *second]

    engine = ScriptedEngine(lambda request: "012", tokenizer)
    replayed = counterfactual(alone, task, (), "removal", num_replays=2)
    assert serve(engine, valued(estimate(), lambda coalition: replayed.mean(coalition, {}))) == [1.0, 0.0, 1.0]


def test_a_question_is_answered_once_a_batch_in_all_its_forms(alone: Team, task: Task, tokenizer) -> None:
    def estimate() -> Estimate[Question, list[float]]:
        return (yield [of("solver"), of(), of("solver", "ghost")])

    engine, asked_for = ScriptedEngine(lambda request: "012", tokenizer), []
    replayed = counterfactual(alone, task, (), "removal", num_replays=2)

    def value(question: Question) -> Steps[float]:
        asked_for.append(question)
        return replayed.mean(question, {})

    assert serve(engine, valued(estimate(), value, replayed.canonical)) == [1.0, 0.0, 1.0]
    assert asked_for == [of("solver"), of()] and len(engine.requests) == 2
