"""The coalition tree: what branches share, what that saves, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from mas_hpc.config import ModelConfig
from mas_hpc.credit_assignment.shapley import Attribution, exact
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.episode import Play, Steps, Team, parallel
from mas_hpc.orchestration.events import run as serve
from mas_hpc.orchestration.replay import Counterfactual, Question, continued, shared, valued
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.rollout.engine import Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task
from tests.orchestration.conftest import EVERYBODY, NAMES, chance, coalitions, counterfactual, of, play_of, record


class ParityJudge(VerifiableJudge):
    """An answer is right when its characters sum to an even number: an untrained model gives both kinds."""

    def outcome(self, task: Task, answer: str | None) -> float:
        return float(answer is not None and sum(map(ord, answer)) % 2 == 0)


def naive_value(task: Task, how: Play, replays: int) -> Callable[[Question], Steps[float]]:
    """Every member of the coalition speaks once, in order, in an episode of its own: 32 calls for the 16 coalitions of 4."""

    def value(coalition: Question) -> Steps[float]:
        assert isinstance(coalition, frozenset)
        agents = tuple(name for name in NAMES if name in coalition)
        alone = replace(how, team=replace(how.team, topology=Pipeline(agents=agents)))
        ends = yield from parallel(
            [continued(task, alone, (), origin=f"{task.id}~{replay}/") for replay in range(replays)]
        )  # fmt: skip
        return fmean(how.judge.outcome(task, how.team.answer(end)) for end in ends)

    return value


def by_the_tree(engine: RolloutEngine, task: Task, how: Play, replays: int) -> Attribution:
    """Exact Shapley values, coalitions as branches of one tree."""
    tree = Counterfactual(task=task, path=(), how=how, value="removal", num_replays=replays)
    return serve(engine, shared(valued(exact(NAMES), lambda coalition: tree.mean(coalition, {})), {}))


def naively(engine: RolloutEngine, task: Task, how: Play, replays: int) -> Attribution:
    """The same, every coalition by itself."""
    return serve(engine, valued(exact(NAMES), naive_value(task, how, replays)))


def test_the_coalition_tree_of_four_agents_costs_seven_calls_a_replay_instead_of_thirty_two(
    pipeline: Team, task: Task, tokenizer
) -> None:
    # S, SC, SCR, SR, R, C, CR: the verifier is read by nobody, and a critic without an answer after it by nobody either.
    credited = 0.0
    for seed in range(10):
        how, tree, naive = play_of(pipeline, seed), ScriptedEngine(chance, tokenizer), ScriptedEngine(chance, tokenizer)
        found, expected = by_the_tree(tree, task, how, 3), naively(naive, task, how, 3)
        assert found.phi == expected.phi, "to the last digit"
        assert (len(tree.requests), len(naive.requests)) == (3 * 7, 3 * 32)
        assert len(tree.requests) <= 3 * 15 and set(tree.requests) < set(naive.requests)
        credited += sum(map(abs, found.phi))
    assert credited > 1, "the game is not one of zeros"


def test_the_tree_has_the_same_values_as_naive_replays_on_a_model(pipeline: Team, task: Task) -> None:
    model, tokenizer = load_model(ModelConfig(hidden_size=32), seed=0)
    engine = NativeEngine(model, tokenizer, max_rows=64)
    how = replace(play_of(pipeline, 1), judge=ParityJudge())
    found = by_the_tree(engine, task, how, 4)
    assert engine.stats.requests == 4 * 7
    assert found.phi == naively(engine, task, how, 4).phi and any(found.phi)


def test_a_looped_pipeline_still_costs_less_by_the_tree(team: Team, task: Task, tokenizer) -> None:
    def rejecting(request: Request) -> str:
        return "!!!-" if request.policy == "verifier" else chance(request)

    tree = ScriptedEngine(rejecting, tokenizer)
    by_the_tree(tree, task, play_of(team), 1)
    # SCRVRV, SRVRV, CRVRV, RVRV: 3 more calls each beside the 7, for reviser and verifier go twice.
    assert len(tree.requests) == 7 + 4 * 3


def test_coalitions_that_cannot_answer_cost_no_call_and_are_worth_nothing(pipeline: Team, task: Task, tokenizer) -> None:
    engine = ScriptedEngine(chance, tokenizer)
    for value in ("removal", "masked"):
        replayed = counterfactual(pipeline, task, record(pipeline, task, tokenizer).path, value)
        for coalition in (of(), of("critic"), of("verifier"), of("critic", "verifier")):
            assert serve(engine, replayed.outcome(coalition, 0)) == 0.0
    assert engine.requests == []


# ---- seeds


def test_an_absent_agent_leaves_the_random_numbers_of_the_others_alone(team: Team, task: Task, tokenizer) -> None:
    seeds: dict[frozenset[str], dict[str, list[int]]] = {}
    for coalition in coalitions(NAMES):
        engine = ScriptedEngine(lambda request: "!!!-" if request.policy == "verifier" else chance(request), tokenizer)
        serve(engine, counterfactual(team, task, (), "removal").outcome(coalition, 0))
        seeds[coalition] = {name: [r.seed for r in engine.requests if r.policy == name] for name in NAMES}
    whole = seeds[EVERYBODY]
    assert [len(whole[name]) for name in NAMES] == [1, 1, 2, 2]
    assert len({seed for found in whole.values() for seed in found}) == 6
    for found in seeds.values():
        for name in NAMES:
            assert found[name] == whole[name][: len(found[name])]


def test_replays_and_questions_have_random_numbers_of_their_own(pipeline: Team, task: Task, tokenizer) -> None:
    engine = ScriptedEngine(chance, tokenizer)
    for one in (task, replace(task, id="other")):
        serve(engine, counterfactual(pipeline, one, (), "removal", num_replays=3).mean(EVERYBODY, {}))
    assert len({request.seed for request in engine.requests}) == len(engine.requests) == 2 * 3 * 3


# ---- sharing


def test_equal_requests_are_served_once_whenever_they_come(tokenizer) -> None:
    def asking(*numbers: int) -> Steps[list[str]]:
        texts = []
        for number in numbers:
            [completion] = yield [request(number)]
            texts.append(completion.text)
        return texts

    def request(number: int) -> Request:
        sampling = SamplingParams(max_new_tokens=1)
        return Request(prompt_ids=(number,), prompt_spans=(("", 1),), policy="p", seed=number, sampling=sampling)

    engine = ScriptedEngine(lambda request: str(request.seed), tokenizer)
    together = shared(parallel([asking(1, 2), asking(2, 1, 3), asking(1, 2)]), {})
    assert serve(engine, together) == [["1", "2"], ["2", "1", "3"], ["1", "2"]]
    assert [request.seed for request in engine.requests] == [1, 2, 3]
