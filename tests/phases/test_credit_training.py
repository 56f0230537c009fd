"""Credit by replays as reward and as weight, on a team whose every outcome is scripted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import CompactTemplate
from mas_hpc.config import ModelConfig
from mas_hpc.config_methods import ATGRPOConfig, CreditConfig, GRPOConfig
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo
from mas_hpc.distributed.world import World
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.phases.credit_training import erased, with_credit_weights, with_sibling_credit
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, Trace

TASK = Task(id="ring/132", question="modulo 4", answer="012", compact="132", grader="ring")


def believes(request: Request, tokenizer) -> str:
    """The solver is right for even seeds; the critic rejects everything and the reviser is always right."""
    if request.policy == "solver":
        return ("012", "111")[request.seed % 2]
    return {"critic": "!!!-", "reviser": "012"}[request.policy]


def copies(request: Request, tokenizer) -> str:
    """The reviser repeats what it read last, or is wrong where nobody answered: the solver alone decides."""
    if request.policy == "reviser":
        text = tokenizer.decode(list(request.prompt_ids))
        return "012" if "S012" in text else "111"
    return believes(request, tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(ModelConfig(), seed=0)[1]


def make_run(tokenizer, behaviour) -> SimpleNamespace:
    names = ("solver", "critic", "reviser")
    agents = {name: Agent(name=name, role=ROLES[name], policy=name, sees="transcript", max_new_tokens=16) for name in names}
    team = Team(agents=agents, topology=Pipeline(agents=names), template=CompactTemplate(tokenizer))
    config = SimpleNamespace(seed=0, rollout=SimpleNamespace(temperature=1.0, max_rows=64))
    engine = ScriptedEngine(lambda request: behaviour(request, tokenizer), tokenizer)
    return SimpleNamespace(
        config=config, team=team, engine=engine, judge=VerifiableJudge(), world=World(), other_models={},
        serve_others=lambda: None, players=World(), led=lambda work, encode, decode: work(),
    )  # fmt: skip


def episodes(run: SimpleNamespace, sampling: Sampling) -> list[Trace]:
    how = Play(team=run.team, sampling=sampling, judge=run.judge, seed=0)
    return collect(run.engine, [TASK], how, max_live=4, on_trace=lambda trace: None)


def tree(**credit) -> ATGRPOConfig:
    return ATGRPOConfig(group_size=4, credit=CreditConfig(**credit))


def rewards(trace: Trace, agent: str) -> list[float | None]:
    return [turn.reward for turn in trace.turns if turn.agent == agent]


def test_a_sibling_earns_the_outcome_of_its_own_path(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, group_size=4))
    [changed], _ = with_sibling_credit(run, traces, tree(method="outcome"), 0)
    assert rewards(changed, "solver") == [float(turn.text == "012") for turn in changed.turns[:4]]
    committed = changed.path[0]
    assert rewards(changed, "critic") == [float(committed.text == "012")] * 4, "all critics follow the committed solver"


def test_leave_one_out_by_resampling_is_the_message_against_what_the_agent_would_write_instead(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, group_size=4))
    [changed], metrics = with_sibling_credit(run, traces, tree(method="loo", replays=64), 0)
    gaps = {text: {r for r, turn in zip(rewards(changed, "solver"), changed.turns, strict=False) if turn.text == text}
            for text in ("012", "111")}  # fmt: skip
    [right], [wrong] = gaps["012"], gaps["111"]
    assert right - wrong == pytest.approx(1.0), "the same baseline for all siblings of a state"
    assert right == pytest.approx(0.5, abs=0.2), "half of the solver's other answers are right"
    assert rewards(changed, "critic") == [0.0] * 4 and rewards(changed, "reviser") == [0.0] * 4, "they change nothing"
    assert metrics["credit/sampled"] < metrics["credit/asked"] / 2, "siblings share their baselines"


def test_credit_that_is_the_same_for_all_siblings_is_reported_as_erased(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, group_size=4))
    _, metrics = with_sibling_credit(run, traces, tree(method="outcome"), 0)
    assert metrics["erased_by_centring/critic"] == 1.0
    assert metrics["erased_by_centring/solver"] == pytest.approx(0.0)


def test_erased_shares_compare_within_a_question_where_episodes_are_the_group(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, episodes=4))
    method = GRPOConfig(group_size=4, group_by="agent", credit=CreditConfig(method="outcome"))
    changed, metrics = with_sibling_credit(run, traces, method, 0)
    assert [trace.path[0].reward for trace in changed] == [trace.reward for trace in traces]
    assert metrics == metrics | erased(changed, by_state=False)
    assert metrics["credit/asked"] == 0, "the episodes have been played"


def test_a_failed_replay_is_a_missing_reward_and_is_counted(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, group_size=4))
    error = Completion(token_ids=(), logprobs=(), text="", finish="error", error="no memory")
    run.engine = ScriptedEngine(lambda request: error if request.policy == "critic" else "012", tokenizer)
    [changed], metrics = with_sibling_credit(run, traces, tree(method="outcome"), 0)
    lost = [turn.agent for turn in changed.turns if turn.reward is None]
    assert lost.count("solver") == 3, "the committed solver's path is there already"
    assert metrics["credit/missing"] == len(lost)


def test_the_team_reward_stays_beside_the_credit(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, group_size=4, alpha=0.5))
    method = tree(method="outcome").model_copy(update={"alpha": 0.5})
    [changed], _ = with_sibling_credit(run, traces, method, 0)
    turn = changed.turns[0]
    assert turn.team_reward == traces[0].reward
    assert turn.reward == turn.local_reward + 0.5 * turn.team_reward


def test_weights_are_by_size_of_credit_and_never_turn_an_advantage_round(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    traces = episodes(run, Sampling(temperature=1.0, group_size=4))
    traces = [
        replace(trace, turns=tuple(replace(turn, reward=float(turn.sibling)) for turn in trace.turns)) for trace in traces
    ]
    credited = at_grpo(traces, GroupSettings(group_size=4, agent_weights={}))
    method = tree(method="shapley", form="weight", value="removal", replays=8, weight_limit=2.0)
    [weighed], metrics = with_credit_weights(run, credited, method, 0)
    for before, after in zip(credited[0].turns, weighed.turns, strict=True):
        assert before.credit is not None and after.credit is not None
        assert after.credit * before.credit >= 0
    solver, critic = (next(t for t in weighed.turns if t.agent == name and t.sibling == 3) for name in ("solver", "critic"))
    plain = next(t for t in credited[0].turns if t.agent == "solver" and t.sibling == 3)
    assert metrics["credit_of/critic"] == 0.0
    assert 0 < metrics["credit_of/solver"] < 1
    assert solver.credit == pytest.approx(2.0 * plain.credit), "all of the credit is the solver's: |phi| / mean is cut to 2"
    assert critic.credit == pytest.approx(0.5 * plain.credit)


def test_a_trace_without_credit_keeps_its_advantages(tokenizer) -> None:
    run = make_run(tokenizer, copies)
    credited = at_grpo(episodes(run, Sampling(temperature=1.0, group_size=4)), GroupSettings(group_size=4, agent_weights={}))
    error = Completion(token_ids=(), logprobs=(), text="", finish="error", error="no memory")
    run.engine = ScriptedEngine(lambda request: error, tokenizer)
    weighed, metrics = with_credit_weights(run, credited, tree(method="shapley", form="weight", value="removal"), 0)
    assert weighed == credited and metrics["credit/missing"] == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"credit": {"form": "weight"}}, "method=local: without replays"),
        ({"credit": {"replays": 4}}, "method=local: without replays"),
        ({"credit": {"method": "shapley", "value": "removal"}}, "centring erases it; set value to masked or resample"),
        ({"credit": {"method": "reward_blame", "value": "replacement"}}, "centring erases it"),
        ({"credit": {"method": "outcome", "form": "weight"}}, "the outcome is the same for all agents"),
        ({"credit": {"method": "loo"}, "commit": "best"}, "commit=best: the committed sibling would earn"),
        (
            {"credit": {"method": "loo", "form": "weight"}, "advantage": "reinforce_pp", "kind": "grpo"},
            "advantage=reinforce_pp whitens later",
        ),
        ({"credit": {"method": "loo"}, "reward_model": "runs/prm/model"}, "would both set a turn's reward"),
        ({"credit": {"method": "loo"}, "kind": "grpo"}, "set group_by=agent"),
    ],
)
def test_credit_that_could_not_act_is_refused(settings, words) -> None:
    method = GRPOConfig if settings.pop("kind", "") else ATGRPOConfig
    with pytest.raises(ValueError, match=words):
        method.model_validate(settings)
