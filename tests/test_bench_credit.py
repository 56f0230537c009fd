"""The planted-fault benchmark's own arithmetic: closed forms, scores and trivial credit, by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.answers import read_answer, read_verdict
from mas_hpc.credit_assignment.arithmetic import check
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.types import Turn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # benchmarks are scripts that stand beside each other

from coalition_tree import REPLAYS, by_tree, free_zeros, naively
from credit_scores import DEAD_ZONE, Found, gathered, names_agent, naming, sign_accuracy, spearman, trivial
from planted_cases import corrupted_start, corrupted_text
from planted_teams import (
    HEALTHY,
    LAZY,
    MISLEADING,
    SABOTEUR,
    TEAMS,
    TWIN,
    Answering,
    Judging,
    PlantedTeam,
    State,
    answer_text,
    build_engine,
    build_team,
    build_tokenizer,
    chance_right,
    coalition_chance,
    exact_credit,
    shapley_by_orders,
    state_after,
    tasks,
)

SIMPLE = PlantedTeam(
    name="simple",
    skills=(
        ("solver", Answering(fresh=0.5)),
        ("critic", Judging(rejects_right=0.0, rejects_wrong=1.0)),
        ("reviser", Answering(fresh=0.0, rejected_wrong=0.8)),
        ("verifier", Judging(rejects_right=0.0, rejects_wrong=0.0)),
    ),
)


def turn(agent: str, *, truth: bool, verdict: bool | None = None, tokens: int = 1) -> Turn:
    return Turn(
        id=agent, parent=None, task_id="t", agent=agent, policy=agent, index=0, prompt_ids=(), prompt_spans=(), text="",
        completion_ids=(0,) * tokens, behavior_logprobs=(0.0,) * tokens, finish="stop", truth=truth, verdict=verdict,
    )  # fmt: skip


# ---- closed forms


def test_removal_sums_over_the_chain() -> None:
    # solver alone 0.5; with an oracle critic the reviser mends 0.8 of the other half; without the critic it mends nothing
    worth = {
        frozenset(): 0.0, frozenset({"solver"}): 0.5, frozenset({"solver", "reviser"}): 0.5,
        frozenset({"solver", "critic", "reviser"}): 0.9, frozenset({"critic", "reviser"}): 0.0,
    }  # fmt: skip
    assert {present: coalition_chance(SIMPLE, present, "removal") for present in worth} == pytest.approx(worth)


def test_shapley_values_of_the_simple_team_by_hand() -> None:
    # unanimity games: 0.5 of the solver alone, and 0.4 of solver, critic and reviser together
    third = 0.4 / 3
    expected = {"solver": 0.5 + third, "critic": third, "reviser": third, "verifier": 0.0}
    assert exact_credit(SIMPLE, "removal") == pytest.approx(expected)


def test_a_rejecting_verifier_gives_the_reviser_a_second_try() -> None:
    # half wrong; the first pass keeps it, the verifier rejects it, the second pass mends 0.8 of it
    looping = SIMPLE.with_fault("looping", "verifier", Judging(rejects_right=0.0, rejects_wrong=1.0))
    assert coalition_chance(looping, frozenset({"solver", "reviser", "verifier"}), "removal") == pytest.approx(0.9)
    # with the critic there are two tries: 0.5 + 0.5 * (0.8 + 0.2 * 0.8)
    assert chance_right(looping.skills, State(), 0) == pytest.approx(0.98)
    assert chance_right(looping.skills, State(answer=False, rejected=True), 4) == pytest.approx(0.8)
    assert chance_right(looping.skills, State(answer=False, rejected=True), 6) == 0.0


def test_recorded_messages_are_kept_until_somebody_absent_speaks() -> None:
    path = (
        turn("solver", truth=False), turn("critic", truth=False, verdict=True), turn("reviser", truth=False),
        turn("verifier", truth=False, verdict=True),
    )  # fmt: skip
    everybody = frozenset(SIMPLE.agents)
    assert coalition_chance(SIMPLE, everybody, "masked", path) == coalition_chance(SIMPLE, everybody, "resample", path) == 0.0
    # the wrong answer is kept: a new critic rejects it and the reviser mends it; without a critic nobody does
    assert coalition_chance(SIMPLE, everybody - {"critic"}, "resample", path) == pytest.approx(0.8)
    assert coalition_chance(SIMPLE, everybody - {"critic"}, "masked", path) == 0.0
    assert coalition_chance(SIMPLE, everybody - {"solver"}, "resample", path) == pytest.approx(0.9)


def test_replacement_gives_the_place_to_the_base_policy() -> None:
    # a base reviser keeps 0.8 of accepted right answers and mends 0.3 of rejected wrong ones
    assert coalition_chance(SIMPLE, frozenset(SIMPLE.agents) - {"reviser"}, "replacement") == pytest.approx(
        0.5 * 0.8 + 0.5 * 0.3
    )


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_values_by_orders_sum_to_the_whole(values: list[float]) -> None:
    def worth(present: frozenset[str]) -> float:
        return values[sum(2**number for number, name in enumerate("abc") if name in present)]

    assert sum(shapley_by_orders("abc", worth).values()) == pytest.approx(values[-1] - values[0], abs=1e-9)


def test_planted_agents_are_worth_what_they_were_planted_for() -> None:
    assert exact_credit(SABOTEUR, "removal")["reviser"] < -0.1
    assert exact_credit(MISLEADING, "removal")["critic"] < -0.05
    assert exact_credit(LAZY, "removal")["verifier"] == pytest.approx(0.0, abs=1e-12)
    twins = exact_credit(TWIN, "removal")
    assert twins["critic"] == pytest.approx(twins["twin"]) and twins["twin"] > 2 * DEAD_ZONE - 0.001
    both, one = frozenset(TWIN.agents), frozenset(TWIN.agents) - {"twin"}
    assert coalition_chance(TWIN, both, "removal") == pytest.approx(coalition_chance(TWIN, one, "removal"))


def test_every_culprit_is_worth_least_and_every_value_has_a_clear_sign() -> None:
    for planted in TEAMS:
        credit = exact_credit(planted, "removal")
        assert all(abs(value) < 0.002 or abs(value) >= 2 * DEAD_ZONE - 0.001 for value in credit.values()), credit
        assert planted.culprit in (None, min(credit, key=credit.__getitem__))


# ---- scripts


@pytest.fixture(scope="module")
def played() -> Iterator[tuple]:
    tokenizer = build_tokenizer()
    team = build_team(HEALTHY, tokenizer)
    how = Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=3)
    traces = collect(build_engine(HEALTHY, tokenizer), tasks(300), how, max_live=64, on_trace=lambda trace: None)
    yield how, traces


def test_scripts_draw_from_the_chain_that_is_summed_over(played: tuple) -> None:
    _, traces = played
    share = fmean(trace.reward for trace in traces)
    assert share == pytest.approx(chance_right(HEALTHY.skills, State(), 0), abs=0.06)  # 3 standard errors of 300
    assert all((state_after(trace.path).answer is True) == (trace.reward == 1.0) for trace in traces)
    assert {len(trace.path) for trace in traces} == {4, 6}


def test_a_corrupted_start_ends_with_a_message_that_was_right_and_is_wrong(played: tuple) -> None:
    how, traces = played
    right = next(trace for trace in traces if trace.path[0].truth and trace.path[1].verdict)
    assert corrupted_start(how, right, 0)[-1].truth is False
    changed = corrupted_start(how, right, 1)
    assert len(changed) == 2 and changed[0] == right.path[0]
    assert changed[1].verdict is False and changed[1].truth is True and changed[1].local_reward == 0.0
    wrong = next(trace for trace in traces if not trace.path[0].truth)
    assert corrupted_start(how, wrong, 0) == ()


def test_wrong_texts_give_a_wrong_answer_and_half_of_them_a_false_equality() -> None:
    texts = [answer_text(20, 30, is_right=False, rng=Random(seed)) for seed in range(200)]
    assert "50" not in {read_answer(text) for text in texts}
    false = sum(not statement.holds for text in texts for statement in check(text))
    assert false == pytest.approx(100, abs=21)  # 3 standard errors
    assert read_answer(answer_text(20, 30, is_right=True, rng=Random(0))) == "50"


def test_interventions_turn_a_verdict_or_move_one_digit() -> None:
    assert corrupted_text("==!=-", Random(0), 4) == "==!=+" and corrupted_text("====+", Random(0), 4) == "====-"
    moved = corrupted_text("3333", Random(0), 4)
    assert sorted(moved) == ["0", "3", "3", "3"]
    assert corrupted_text("", Random(0), 4) == ""
    assert read_verdict("I have checked it. VERDICT: INCORRECT") is False


# ---- the coalition tree


def test_the_tree_finds_what_naive_replays_find_by_fewer_calls() -> None:
    tokenizer = build_tokenizer()
    engine, team = build_engine(HEALTHY, tokenizer), build_team(HEALTHY, tokenizer)
    team = replace(team, topology=Pipeline(agents=tuple(team.agents)))
    how = Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=3)
    traces = collect(engine, tasks(5), how, max_live=64, on_trace=lambda trace: None)
    ours, theirs = by_tree(engine, traces, how), naively(engine, traces, how)
    assert ours.phi == theirs.phi and any(map(any, ours.phi))
    # S, SC, SCR, SR, R, C, CR, against the 4 * 8 turns of the 16 coalitions of 4
    assert (ours.calls, theirs.calls) == (5 * REPLAYS * 7, 5 * REPLAYS * 32)
    assert free_zeros(how, traces[0]) == 1.0


# ---- scores


def test_spearman_with_ties_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_naming_shares_ties_out() -> None:
    assert naming([0.0, -1.0, 0.5], 1) == 1.0
    assert naming([0.0, 0.0, 0.5], 1) == 0.5
    assert naming([0.0, -1.0, 0.5], 0) == 0.0


def test_agents_that_did_not_speak_are_not_named() -> None:
    found = Found(messages=(0.1,), agents={"solver": 0.1, "critic": 0.0})
    assert names_agent(found, "solver", {"solver"}) == 1.0
    assert names_agent(found, "solver", {"solver", "critic"}) == 0.0


def test_signs_count_zero_as_a_sign_of_its_own() -> None:
    truth = {"a": 0.5, "b": 0.0, "c": -0.2, "d": 0.3}
    assert sign_accuracy({"a": 0.1, "b": DEAD_ZONE / 2, "c": -0.1, "d": -0.1}, truth) == 0.75


def test_agents_get_the_sum_of_their_parts_or_the_mean_of_their_scores() -> None:
    path = (turn("a", truth=True), turn("b", truth=True), turn("a", truth=True))
    assert gathered(path, ("a", "b", "c"), (0.5, 0.25, 1.0), mean=False) == {"a": 1.5, "b": 0.25, "c": 0.0}
    assert gathered(path, ("a", "b", "c"), (0.5, 0.25, 1.0), mean=True) == {"a": 0.75, "b": 0.25, "c": 0.0}


def test_trivial_rules_by_hand() -> None:
    path = (turn("a", truth=True, tokens=6), turn("b", truth=True, tokens=2))
    assert trivial("most talkative blamed", path, ("a", "b")).agents == {"a": -0.75, "b": -0.25}
    assert trivial("most talkative praised", path, ("a", "b")).messages == (0.75, 0.25)
    assert trivial("first speaker blamed", path, ("a", "b")).agents == {"a": -1.0, "b": 0.0}
    assert trivial("constant step 1 blamed", path, ("a", "b")).messages == (0.0, -1.0)
    assert naming(trivial("everybody alike", path, ("a", "b")).messages, 0) == 0.5
