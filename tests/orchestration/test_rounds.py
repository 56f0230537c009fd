"""Rounds in which several agents speak: what their siblings are worth, what they read, and whose answer is the episode's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import ChatTemplate
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Debate, MixtureOfAgents, Single
from mas_hpc.phases.online import _outcome
from mas_hpc.rollout.engine import Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, Trace
from tests.agents.test_template import chat_tokenizer  # noqa: F401 (a fixture)

DEBATERS = ("ada", "ben", "cleo")


def speaking(names: tuple[str, ...], template, topology, *, last: str = "debater") -> Team:
    roles = dict.fromkeys(names[:-1], ROLES["debater"]) | {names[-1]: ROLES[last]}
    agents = {name: Agent(name=name, role=role, policy=name, sees=role.sees, max_new_tokens=64) for name, role in roles.items()}
    return Team(agents=agents, topology=topology, template=template)


def played(team: Team, task: Task, tokenizer, behaviour, sampling: Sampling) -> Trace:
    how = Play(team=team, sampling=sampling, judge=VerifiableJudge(), seed=0)
    [trace] = collect(ScriptedEngine(behaviour, tokenizer), [task], how, max_live=1, on_trace=lambda trace: None)
    return trace


def answer(request: Request) -> str:
    return ("012", "111")[request.seed % 2]


@pytest.mark.parametrize("judge", ["", "judge"])
def test_a_sibling_is_valued_by_whole_rounds_from_it_on(team: Team, task: Task, tokenizer, judge: str) -> None:
    names = (*DEBATERS, judge) if judge else DEBATERS
    topology = Debate(debaters=DEBATERS, rounds=2, judge=judge)
    debate = speaking(names, team.template, topology, last=judge or "debater")
    trace = played(debate, task, tokenizer, answer, Sampling(temperature=1.0, group_size=2, team_rollouts=1, alpha=1.0))
    order = [*DEBATERS * 2, judge] if judge else [*DEBATERS * 2]
    for sibling in (turn for turn in trace.turns if not turn.counterfactual and turn.index < len(order) - 1):
        onward = [turn for turn in trace.turns if turn.counterfactual and turn.id.startswith(f"{sibling.id}~0/")]
        assert [turn.agent for turn in onward] == order[sibling.index + 1 :], sibling.id
        assert [turn.index for turn in onward] == list(range(sibling.index + 1, len(order)))


def test_members_of_a_round_who_are_played_onward_do_not_read_the_sibling(team: Team, task: Task, tokenizer) -> None:
    debate = speaking(DEBATERS, team.template, Debate(debaters=DEBATERS, rounds=2))
    trace = played(debate, task, tokenizer, answer, Sampling(temperature=1.0, group_size=2, team_rollouts=1, alpha=1.0))
    sibling = next(turn for turn in trace.turns if turn.agent == "ada" and turn.index == 0)
    onward = {turn.index: turn for turn in trace.turns if turn.id.startswith(f"{sibling.id}~0/")}
    assert onward[1].prompt_ids == onward[2].prompt_ids == sibling.prompt_ids, "ben and cleo read the question"
    assert sibling.completion_ids == onward[3].prompt_ids[len(sibling.prompt_ids) :][: len(sibling.completion_ids)]


def test_a_chat_mixture_whose_references_have_lost_their_end_token_is_a_whole_group(chat_tokenizer) -> None:  # noqa: F811
    task = Task(id="q", question="What is 6 x 7?", answer="42")
    mixture = MixtureOfAgents(proposers=("first", "second"), aggregator="last", layers=1)
    team = speaking(("first", "second", "last"), ChatTemplate(chat_tokenizer), mixture, last="aggregator")
    agents = {
        name: replace(agent, sees=("references" if name == "last" else "question")) for name, agent in team.agents.items()
    }
    trace = played(
        replace(team, agents=agents), task, chat_tokenizer, lambda r: f"\\boxed{{{41 + r.seed % 2}}}",
        Sampling(temperature=1.0, group_size=2),
    )  # fmt: skip
    assert all(turn.finish == "stop" for turn in trace.turns)
    [credited] = at_grpo([trace], GroupSettings(group_size=2, agent_weights={}))
    assert all(turn.credit is not None for turn in credited.turns)


@pytest.mark.parametrize(
    ("texts", "outcome"), [(("012", "012", "111"), 1.0), (("111", "111", "012"), 0.0)], ids=["most right", "most wrong"]
)
def test_the_outcome_of_a_vote_is_the_teams_and_not_the_last_speakers(
    team: Team, task: Task, tokenizer, texts, outcome
) -> None:
    debate = speaking(DEBATERS, team.template, Debate(debaters=DEBATERS, rounds=1))
    spoken = dict(zip(DEBATERS, texts, strict=True))
    trace = played(debate, task, tokenizer, lambda request: spoken[request.policy], Sampling(temperature=1.0))
    assert trace.reward == outcome != trace.path[-1].reward
    assert _outcome(SimpleNamespace(team=debate), trace) == outcome
    judged = replace(debate, topology=Debate(debaters=DEBATERS[:2], rounds=1, judge="cleo"))
    assert _outcome(SimpleNamespace(team=judged), trace) == trace.path[-1].reward
    assert Single(agent="ada", samples=3).votes
