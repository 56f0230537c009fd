"""Replays: what coalitions and kept prefixes are worth, what that costs in model calls, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES, Sees
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.events import run as serve
from mas_hpc.orchestration.replay import ValueFunction, continued
from mas_hpc.orchestration.topology import Debate, MixtureOfAgents, Pipeline, Single, Topology
from mas_hpc.rollout.engine import BASE_POLICY
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, rounds_of
from tests.orchestration.conftest import EVERYBODY, NAMES, asked, chance, coalitions, counterfactual, of, play_of, record


def teammates(team: Team, *names: str, topology: Topology, sees: Sees = "transcript") -> Team:
    """Agents who answer, of policies of their own."""
    agents = {
        name: Agent(name=name, role=ROLES["debater"], policy=name, sees=sees, max_new_tokens=16) for name in names
    }  # fmt: skip
    return replace(team, agents=agents, topology=topology)


FORMS: dict[str, Callable[[Team], Team]] = {
    "pipeline": lambda team: replace(team, topology=Pipeline(agents=NAMES)),
    "loop": lambda team: team,
    "stops": lambda team: replace(team, topology=Pipeline(agents=NAMES, stop_when_accepted=True)),
    "debate": lambda team: teammates(team, "ada", "ben", topology=Debate(debaters=("ada", "ben"), rounds=2)),
    "votes": lambda team: teammates(team, "ada", topology=Single(agent="ada", samples=3)),
    "mixture": lambda team: teammates(
        team, "ada", "ben", "cleo", sees="references",
        topology=MixtureOfAgents(proposers=("ada", "ben"), aggregator="cleo", layers=2),
    ),
}  # fmt: skip


# ---- masked


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


# ---- alternatives


def test_alternatives_are_fresh_messages_at_the_same_state(pipeline: Team, task: Task, tokenizer) -> None:
    trace, engine = record(pipeline, task, tokenizer), ScriptedEngine(chance, tokenizer)
    found = serve(engine, counterfactual(pipeline, task, trace.path, "masked").alternatives(2, 6))
    assert [turn.text for turn in found] == [chance(request) for request in engine.requests]
    assert {turn.text for turn in found} == {"012", "111"}
    assert len({turn.seed for turn in found} | {turn.seed for turn in trace.path}) == 6 + 4
    assert {turn.prompt_ids for turn in found} == {trace.path[2].prompt_ids}
    assert asked(engine) == ["reviser"] * 6


def test_an_alternative_inside_a_round_leaves_the_members_before_it_in_place(team: Team, task: Task, tokenizer) -> None:
    debate = FORMS["debate"](team)
    trace, engine = record(debate, task, tokenizer, lambda r: "111"), ScriptedEngine(lambda r: "012", tokenizer)
    [sibling] = serve(engine, counterfactual(debate, task, trace.path, "masked").alternatives(3, 1))
    assert (sibling.agent, sibling.parent, sibling.prompt_ids) == ("ben", trace.path[1].id, trace.path[3].prompt_ids)
    assert asked(engine) == ["ben"] and sibling.text == "012"
