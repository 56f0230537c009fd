"""Replays: what coalitions and kept prefixes are worth, what that costs in model calls, and what is left alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES, Sees
from mas_hpc.config import ModelConfig
from mas_hpc.credit_assignment.estimate import Estimate
from mas_hpc.credit_assignment.shapley import Attribution, exact
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.collect import run as serve
from mas_hpc.orchestration.episode import Play, Steps, Team, parallel
from mas_hpc.orchestration.replay import Counterfactual, Outcomes, Question, ValueFunction, continued, shared, valued
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Debate, MixtureOfAgents, Pipeline, SelfConsistency, Topology
from mas_hpc.rollout.engine import BASE_POLICY, Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.scripted import Behaviour, ScriptedEngine
from mas_hpc.types import Task, Trace, Turn, rounds_of

NAMES = ("solver", "critic", "reviser", "verifier")
EVERYBODY = frozenset(NAMES)
FAILED = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")


def of(*names: str) -> frozenset[str]:
    return frozenset(names)


def coalitions(names: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(members) for size in range(len(names) + 1) for members in combinations(names, size)]


def drawn(request: Request) -> int:
    """A number that depends on all of a request, as a sampled completion does."""
    record = repr((request.prompt_ids, request.policy, request.seed)).encode()
    return int.from_bytes(hashlib.blake2b(record, digest_size=4).digest(), "big")


def chance(request: Request) -> str:
    """Agents named after what they give; answers are right in one of two requests."""
    given = ("===+", "!!!-") if request.policy in ("critic", "verifier") else ("012", "111")
    return given[drawn(request) % 2]


class ParityJudge(VerifiableJudge):
    """An answer is right when its characters sum to an even number: an untrained model gives both kinds."""

    def outcome(self, task: Task, answer: str | None) -> float:
        return float(answer is not None and sum(map(ord, answer)) % 2 == 0)


@pytest.fixture
def pipeline(team: Team) -> Team:
    return replace(team, topology=Pipeline(agents=NAMES))


def teammates(team: Team, *names: str, topology: Topology, sees: Sees = "transcript") -> Team:
    """Agents who answer, of policies of their own."""
    agents = {
        name: Agent(name=name, role=ROLES["debater"], policy=name, sees=sees, max_new_tokens=16) for name in names
    }  # fmt: skip
    return replace(team, agents=agents, topology=topology)


def play_of(team: Team, seed: int = 0) -> Play:
    return Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=seed)


def record(team: Team, task: Task, tokenizer, behaviour: Behaviour = chance, seed: int = 0) -> Trace:
    """One episode, as a run leaves it behind."""
    engine = ScriptedEngine(behaviour, tokenizer)
    return collect(engine, [task], play_of(team, seed), max_live=1, on_trace=lambda trace: None)[0]


def counterfactual(
    team: Team, task: Task, path: Sequence[Turn], value: ValueFunction, *, num_replays: int = 1, seed: int = 7
) -> Counterfactual:
    how = play_of(team, seed)
    return Counterfactual(task=task, path=tuple(path), how=how, value=value, num_replays=num_replays)


def asked(engine: ScriptedEngine) -> list[str]:
    """Whose messages were sampled, by policy."""
    return [request.policy for request in engine.requests]


# ---- the coalition tree


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


# ---- masked


FORMS: dict[str, Callable[[Team], Team]] = {
    "pipeline": lambda team: replace(team, topology=Pipeline(agents=NAMES)),
    "loop": lambda team: team,
    "stops": lambda team: replace(team, topology=Pipeline(agents=NAMES, stop_when_accepted=True)),
    "debate": lambda team: teammates(team, "ada", "ben", topology=Debate(debaters=("ada", "ben"), rounds=2)),
    "votes": lambda team: teammates(team, "ada", topology=SelfConsistency(agent="ada", samples=3)),
    "mixture": lambda team: teammates(
        team, "ada", "ben", "cleo", sees="references",
        topology=MixtureOfAgents(proposers=("ada", "ben"), aggregator="cleo", layers=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", ["masked", "resample"])
def test_everybody_together_is_the_record_and_costs_no_call(
    team: Team, task: Task, tokenizer, form: str, value: ValueFunction
) -> None:
    team, outcomes = FORMS[form](team), set()
    for seed in range(8):
        trace, engine = record(team, task, tokenizer, seed=seed), ScriptedEngine(chance, tokenizer)
        replayed = counterfactual(team, task, trace.path, value)
        assert serve(engine, replayed.outcome(frozenset(team.agents), 0)) == trace.reward
        assert serve(engine, replayed.outcome(len(trace.path), 0)) == trace.reward
        assert engine.requests == []
        outcomes.add(trace.reward)
    assert outcomes == {0.0, 1.0}


def test_masked_keeps_messages_whose_author_reads_what_it_read_then(pipeline: Team, task: Task, tokenizer) -> None:
    trace, engine = record(pipeline, task, tokenizer), ScriptedEngine(chance, tokenizer)
    replayed = counterfactual(pipeline, task, trace.path, "masked")
    serve(engine, replayed.outcome(of("solver", "reviser"), 0))
    assert asked(engine) == ["reviser"], "it does not read the critic, the solver reads the question as before"
    assert engine.requests[0].prompt_ids[: len(trace.path[0].prompt_ids) + 3] == (
        trace.path[0].prompt_ids + trace.path[0].completion_ids
    )
    engine.requests.clear()
    serve(engine, replayed.outcome(of("critic", "reviser"), 0))
    assert asked(engine) == ["critic", "reviser"]


def test_masked_keeps_later_messages_of_agents_that_read_only_the_question(team: Team, task: Task, tokenizer) -> None:
    debate = teammates(team, "ada", "ben", topology=Debate(debaters=("ada", "ben"), rounds=2), sees="question")
    trace, engine = record(debate, task, tokenizer), ScriptedEngine(chance, tokenizer)
    outcome = serve(engine, counterfactual(debate, task, trace.path, "masked").outcome(of("ben"), 0))
    assert engine.requests == [] and outcome == float(trace.path[3].text == "012")


def test_kept_and_fresh_messages_of_one_round_are_one_round(team: Team, task: Task, tokenizer) -> None:
    # ada reads the question only, so her second message is kept when cleo is absent; ben reads cleo and speaks anew.
    debate = teammates(team, "ada", "ben", "cleo", topology=Debate(debaters=("ada", "ben", "cleo"), rounds=2))
    agents = {**debate.agents, "ada": replace(debate.agents["ada"], sees="question")}
    debate = replace(debate, agents=agents)
    recorded = {"ada": "012", "ben": "111", "cleo": "111"}
    trace = record(debate, task, tokenizer, lambda request: recorded[request.policy])
    engine = ScriptedEngine(lambda request: "111", tokenizer)
    alone = replace(play_of(debate), team=replace(debate, topology=debate.topology.restricted(of("ada", "ben"), of())))
    kept = [turn for turn in trace.path if turn.agent != "cleo"]
    end = serve(engine, continued(task, alone, kept, origin="q~0/"))
    assert asked(engine) == ["ben"]
    assert [[turn.agent for turn in members] for members in rounds_of(end)] == [["ada", "ben"], ["ada", "ben"]]
    assert alone.team.answer(end) == "012", "a tie goes to the first"


# ---- resample


@pytest.mark.parametrize("instead", ["230", "111"], ids=["another message", "the same message"])
def test_resampling_in_a_debate_keeps_the_others_of_the_round_and_samples_all_that_follows(
    team: Team, task: Task, tokenizer, instead: str
) -> None:
    names = ("ada", "ben", "cleo")
    debate = teammates(team, *names, topology=Debate(debaters=names, rounds=2))
    trace = record(debate, task, tokenizer, lambda request: "111")
    engine = ScriptedEngine(lambda request: instead, tokenizer)
    outcome = serve(engine, counterfactual(debate, task, trace.path, "resample").outcome(of("ada", "cleo"), 0))
    assert asked(engine) == ["ben", "ada", "ben", "cleo"]
    assert engine.requests[0].prompt_ids == trace.path[1].prompt_ids
    assert engine.requests[0].seed != trace.path[1].seed
    read = tokenizer.decode(engine.requests[1].prompt_ids)
    assert read == f"Q132S111Q132S{instead}Q132S111Q132S", "ada's and cleo's first messages stay"
    assert outcome == float(instead == "230")


def test_resampling_begins_at_the_first_message_of_an_absent_agent(pipeline: Team, task: Task, tokenizer) -> None:
    trace = record(pipeline, task, tokenizer)
    for absent, sampled in (("verifier", ["verifier"]), ("reviser", ["reviser", "verifier"]), ("solver", list(NAMES))):
        engine = ScriptedEngine(chance, tokenizer)
        serve(engine, counterfactual(pipeline, task, trace.path, "resample").outcome(EVERYBODY - {absent}, 0))
        assert asked(engine) == sampled


def test_who_did_not_speak_is_worth_nothing_when_resampled(team: Team, task: Task, tokenizer) -> None:
    stops = FORMS["stops"](team)
    trace = record(stops, task, tokenizer, lambda request: "012" if request.policy == "solver" else "===+")
    assert [turn.agent for turn in trace.path] == ["solver", "critic"]
    engine = ScriptedEngine(chance, tokenizer)
    assert serve(engine, counterfactual(stops, task, trace.path, "resample").outcome(EVERYBODY - {"reviser"}, 0)) == 1.0
    assert engine.requests == []


# ---- prefixes


@pytest.mark.parametrize("value", ["removal", "replacement", "masked", "resample"])
def test_a_kept_prefix_is_continued_by_the_whole_team(
    pipeline: Team, task: Task, tokenizer, value: ValueFunction
) -> None:  # fmt: skip
    trace = record(pipeline, task, tokenizer)
    for kept in range(5):
        engine = ScriptedEngine(chance, tokenizer)
        serve(engine, counterfactual(pipeline, task, trace.path, value).outcome(kept, 0))
        assert asked(engine) == list(NAMES[kept:])
        if kept < 4:
            assert engine.requests[0].prompt_ids == trace.path[kept].prompt_ids


def test_a_prefix_may_end_inside_a_round(team: Team, task: Task, tokenizer) -> None:
    debate = FORMS["debate"](team)
    trace, engine = record(debate, task, tokenizer), ScriptedEngine(chance, tokenizer)
    replayed = counterfactual(debate, task, trace.path, "removal")
    serve(engine, replayed.outcome(1, 0))
    assert asked(engine) == ["ben", "ada", "ben"]
    assert engine.requests[0].prompt_ids == trace.path[1].prompt_ids
    assert [len(replayed.state(place)) for place in range(4)] == [0, 0, 2, 2]


# ---- replacement


def test_the_base_policy_speaks_for_absent_agents(pipeline: Team, task: Task, tokenizer) -> None:
    for coalition in coalitions(NAMES):
        engine = ScriptedEngine(lambda request: "012" if request.policy == BASE_POLICY else chance(request), tokenizer)
        outcome = serve(engine, counterfactual(pipeline, task, (), "replacement").outcome(coalition, 0))
        assert asked(engine) == [name if name in coalition else BASE_POLICY for name in NAMES]
        assert [policy for policy, _ in engine.requests[-1].prompt_spans if policy] == asked(engine)[:3]
        assert "reviser" in coalition or outcome == 1.0


# ---- missing values and known ones


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


# ---- questions that mean the same play


def test_coalitions_that_play_alike_are_one_question(pipeline: Team, task: Task, tokenizer) -> None:
    trace = record(pipeline, task, tokenizer)
    for value in ("removal", "masked"):
        canonical = counterfactual(pipeline, task, trace.path, value).canonical
        found = {
            "".join(name[0] for name in NAMES if name in coalition): canonical(coalition) for coalition in coalitions(NAMES)
        }
        assert set(found.values()) == {
            of(), of("solver"), of("reviser"), of("solver", "reviser"), of("critic", "reviser"), EVERYBODY - {"verifier"},
        }  # fmt: skip
        assert found["scv"] == of("solver") and found["crv"] == of("critic", "reviser") and found["cv"] == of()
    assert counterfactual(pipeline, task, trace.path, "replacement").canonical(of("verifier")) == of("verifier")


def test_resampled_coalitions_that_keep_a_prefix_are_that_prefix(team: Team, task: Task, tokenizer) -> None:
    debate = FORMS["debate"](team)
    canonical = counterfactual(debate, task, record(debate, task, tokenizer).path, "resample").canonical
    assert [canonical(coalition) for coalition in (of(), of("ada"), of("ben"), of("ada", "ben"))] == [0, 1, of("ben"), 4]
    assert canonical(3) == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", ["removal", "masked", "resample", "replacement"])
def test_the_canonical_question_asks_for_the_same_completions_and_has_the_same_outcome(
    team: Team, task: Task, tokenizer, form: str, value: ValueFunction
) -> None:
    team = FORMS[form](team)
    for seed in range(3):
        replayed = counterfactual(team, task, record(team, task, tokenizer, seed=seed).path, value)
        for coalition in coalitions(list(team.agents)):
            plain, canonical = ScriptedEngine(chance, tokenizer), ScriptedEngine(chance, tokenizer)
            expected = serve(plain, replayed.outcome(coalition, 0))
            assert serve(canonical, replayed.outcome(replayed.canonical(coalition), 0)) == expected
            assert canonical.requests == plain.requests


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


# ---- alternatives


def test_alternatives_are_fresh_messages_at_the_same_state_with_the_value_of_what_follows(
    pipeline: Team, task: Task, tokenizer
) -> None:
    # The reviser copies the solver, so an alternative of the solver is worth 1 or 0.
    def copying(request: Request) -> str:
        prompt = tokenizer.decode(request.prompt_ids)
        return prompt[5:8] if request.policy == "reviser" else chance(request)

    trace, engine = record(pipeline, task, tokenizer, copying), ScriptedEngine(copying, tokenizer)
    replayed = counterfactual(pipeline, task, trace.path, "masked", num_replays=2)
    found = serve(engine, replayed.alternatives(0, 6))
    assert {turn.text for turn, _ in found} == {"012", "111"}
    assert all(value == float(turn.text == "012") for turn, value in found)
    assert len({turn.seed for turn, _ in found} | {trace.path[0].seed}) == 7
    assert {turn.prompt_ids for turn, _ in found} == {trace.path[0].prompt_ids}
    assert asked(engine) == ["solver"] * 6 + [name for name in NAMES[1:] for _ in range(12)]


def test_an_alternative_inside_a_round_leaves_the_members_before_it_in_place(team: Team, task: Task, tokenizer) -> None:
    debate = FORMS["debate"](team)
    trace, engine = record(debate, task, tokenizer, lambda r: "111"), ScriptedEngine(lambda r: "012", tokenizer)
    [(sibling, value)] = serve(engine, counterfactual(debate, task, trace.path, "masked").alternatives(3, 1))
    assert (sibling.agent, sibling.parent, sibling.prompt_ids) == ("ben", trace.path[1].id, trace.path[3].prompt_ids)
    assert asked(engine) == ["ben"] and value == 0.0, "ada's 111 is the first of a tie"


def test_an_alternative_that_failed_has_no_value(pipeline: Team, task: Task, tokenizer) -> None:
    trace = record(pipeline, task, tokenizer)
    engine = ScriptedEngine(lambda request: FAILED, tokenizer)
    [(sibling, value)] = serve(engine, counterfactual(pipeline, task, trace.path, "removal").alternatives(2, 1))
    assert sibling.finish == "error" and math.isnan(value) and asked(engine)[0] == "reviser"


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
