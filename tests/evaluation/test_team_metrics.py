"""Metrics of teams on small traces whose numbers are counted by hand."""

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mas_hpc.errors import DataError
from mas_hpc.evaluation.metrics import VerdictBalance
from mas_hpc.evaluation.team_metrics import (
    FinishReasons,
    Flips,
    LiveVerdicts,
    Outcomes,
    ParseRate,
    RoleCredit,
    TokenUse,
    convergence,
    count_flips,
    credit_by_role,
    finish_reasons,
    flips,
    live_verdicts,
    outcomes,
    parse_rate,
    print_team,
    summary,
    token_use,
)
from mas_hpc.types import Task, Trace, Turn

DEBATE = {"a": "answer", "b": "answer", "c": "answer", "judge": "answer"}
PIPELINE = {"solver": "answer", "critic": "verdict", "reviser": "answer"}
FAILED = "failed"
NONE = Flips(to_right=0, to_wrong=0, stayed_right=0, stayed_wrong=0, unknown=0)


def make(agent, answer=None, *, number=0, parent=None, verdict=None, truth=None, length=1, **fields):
    """A turn that answers `answer`, where "4" is right, or judges; FAILED has neither text nor truth."""
    failed = answer == FAILED
    if answer is not None and truth is None and not failed:
        truth = answer == "4"
    length = 0 if failed else length
    turn = Turn(
        id=f"{number}-{agent}", parent=parent, task_id="q", agent=agent, policy="shared", index=number, prompt_ids=(1,),
        prompt_spans=(("", 1),), completion_ids=(5,) * length, behavior_logprobs=(0.0,) * length, text="",
        answer=None if failed else answer, verdict=verdict, truth=truth, finish="error" if failed else "stop", committed=True,
    )  # fmt: skip
    return replace(turn, **fields)


def debate(*rounds, reward=None, task="q"):
    """A trace of rounds, each a dict agent -> answer; the speakers of one continue the last turn of the round before."""
    turns, parent = [], None
    for answers in rounds:
        together = [
            make(agent, answer, number=len(turns) + i, parent=parent, task_id=task)
            for i, (agent, answer) in enumerate(answers.items())
        ]
        turns += together
        parent = together[-1].id
    return Trace(task=Task(id=task, question="?", answer="4"), turns=tuple(turns), reward=reward)


def chain(*turns, reward=None, task="q"):
    """A trace in which each turn continues the one before."""
    linked = [
        make(**{**turn, "number": i, "parent": f"{i - 1}-{turns[i - 1]['agent']}" if i else None, "task_id": task})
        for i, turn in enumerate(turns)
    ]
    return Trace(task=Task(id=task, question="?", answer="4"), turns=tuple(linked), reward=reward)


def says(agent, answer, **fields):
    return {"agent": agent, "answer": answer, **fields}


def judges(agent, verdict, truth, **fields):
    return {"agent": agent, "verdict": verdict, "truth": truth, **fields}


def test_a_debate_that_converges():
    traces = [debate({"a": "4", "b": "5", "c": "5"}, {"a": "4", "b": "4", "c": "5"}), debate({"a": "4", "b": "4", "c": "4"})]
    first, second = convergence(traces, DEBATE)
    assert (first.number, first.num_traces, first.num_answers) == (0, 2, 6)
    assert first.agreement == pytest.approx((1 + 3) / 6)
    assert (first.accuracy, first.unreadable, first.ungraded, first.flips) == (4 / 6, 0.0, 0, NONE)
    assert (second.number, second.num_traces, second.num_answers) == (1, 1, 3)
    assert (second.agreement, second.accuracy) == (pytest.approx(1 / 3), 2 / 3)
    assert second.flips == Flips(to_right=1, to_wrong=0, stayed_right=1, stayed_wrong=1, unknown=0)


def test_answers_of_different_traces_are_not_compared():
    (found,) = convergence([debate({"a": "4", "b": "5"}), debate({"a": "5", "b": "4"})], DEBATE)
    assert found.agreement == 0.0


def test_failed_debaters_agree_with_nobody_and_are_not_right():
    first, second = convergence([debate({"a": FAILED, "b": FAILED, "c": "4"}, {"a": "4", "b": "5", "c": FAILED})], DEBATE)
    assert (first.agreement, first.accuracy, first.unreadable, first.ungraded) == (0.0, 1 / 3, 2 / 3, 2)
    assert second.flips == Flips(to_right=0, to_wrong=0, stayed_right=0, stayed_wrong=0, unknown=3)


def test_ungraded_answers_are_counted_and_not_right():
    trace = Trace(task=Task(id="q", question="?", answer="4"), turns=(make("a"),))
    (found,) = convergence([trace], DEBATE)
    assert (found.accuracy, found.ungraded, found.agreement) == (0.0, 1, None)


def test_an_unreadable_answer_after_a_right_one_is_a_flip_to_wrong():
    trace = chain(says("a", "4"), {"agent": "a", "truth": False})
    _, second = convergence([trace], DEBATE)
    assert (second.unreadable, second.flips.to_wrong) == (1.0, 1)


def test_samples_of_one_agent_in_one_round_are_compared_but_do_not_flip():
    trace = Trace(
        task=Task(id="q", question="?", answer="4"), turns=tuple(make("a", answer, number=i) for i, answer in enumerate("445"))
    )
    (found,) = convergence([trace], DEBATE)
    assert (found.num_answers, found.agreement, found.flips) == (3, pytest.approx(1 / 3), NONE)
    assert flips([trace], DEBATE) == {}


def test_rounds_without_answers_keep_their_number_free():
    trace = chain(says("solver", "5"), judges("critic", False, False), says("reviser", "4"))
    assert [(found.number, found.accuracy) for found in convergence([trace], PIPELINE)] == [(0, 0.0), (2, 1.0)]


def test_siblings_that_were_not_committed_are_in_no_round_and_no_flip():
    trace = chain(says("solver", "5"), says("reviser", "4"), says("reviser", "5", committed=False))
    assert [found.accuracy for found in convergence([trace], PIPELINE)] == [0.0, 1.0]
    repaired = Flips(to_right=1, to_wrong=0, stayed_right=0, stayed_wrong=0, unknown=0)
    assert flips([trace], PIPELINE) == {"solver -> reviser": repaired}


def test_an_agent_that_sits_out_a_round_is_compared_with_the_last_round_that_it_spoke_in():
    *_, last = convergence([debate({"a": "4", "b": "4"}, {"b": "5"}, {"a": "5"})], DEBATE)
    assert last.flips == Flips(to_right=0, to_wrong=1, stayed_right=0, stayed_wrong=0, unknown=0)


def test_flips_of_a_pipeline_skip_the_verdicts_and_follow_the_loop():
    verdict = judges("critic", False, False)
    traces = [
        chain(says("solver", "5"), verdict, says("reviser", "4"), verdict, says("reviser", "5")),
        chain(says("solver", "4"), verdict, says("reviser", "5")),
        chain(says("solver", "4"), verdict, says("reviser", FAILED)),
    ]
    assert flips(traces, PIPELINE) == {
        "solver -> reviser": Flips(to_right=1, to_wrong=1, stayed_right=0, stayed_wrong=0, unknown=1),
        "reviser -> reviser": Flips(to_right=0, to_wrong=1, stayed_right=0, stayed_wrong=0, unknown=0),
    }


def test_a_debater_is_compared_with_itself_and_the_judge_with_everyone():
    found = flips([debate({"a": "4", "b": "5"}, {"a": "5", "b": "5"}, {"judge": "4"})], DEBATE)
    assert {pair: (counts.to_right, counts.to_wrong, counts.stayed_wrong) for pair, counts in found.items()} == {
        "a -> a": (0, 1, 0),
        "b -> b": (0, 0, 1),
        "a -> judge": (1, 0, 0),
        "b -> judge": (1, 0, 0),
    }


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.sampled_from([True, False, None]))))
def test_every_pair_is_counted_once_and_accuracy_moves_by_the_net_flips(pairs):
    found = count_flips(pairs)
    counted = found.to_right + found.to_wrong + found.stayed_right + found.stayed_wrong
    assert counted + found.unknown == len(pairs)
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    assert counted == len(known)
    assert sum(after - before for before, after in known) == found.to_right - found.to_wrong


def test_parse_rate_counts_what_each_role_gives():
    traces = [
        chain(says("solver", "4"), judges("critic", None, True), {"agent": "planner"}),
        chain(says("solver", FAILED), judges("critic", False, False)),
        chain({"agent": "solver", "truth": False}),
    ]
    roles = {"solver": "answer", "critic": "verdict", "planner": "text", "silent": "verdict"}
    assert parse_rate(traces, roles) == {
        "solver": ParseRate(asked=3, readable=1, failed=1, rate=1 / 3),
        "critic": ParseRate(asked=2, readable=1, failed=0, rate=0.5),
        "silent": ParseRate(asked=0, readable=0, failed=0, rate=None),
    }


def test_rates_take_siblings_but_no_counterfactual_turns():
    turns = (make("solver", "4"), make("solver", committed=False), make("solver", "4", committed=False, counterfactual=True))
    traces = [Trace(task=Task(id="q", question="?", answer="4"), turns=turns)]
    assert parse_rate(traces, PIPELINE)["solver"] == ParseRate(asked=2, readable=1, failed=0, rate=0.5)
    assert finish_reasons(traces) == {"solver": FinishReasons(stop=2, length=0, error=0)}


def test_live_verdicts_keep_unreadable_and_ungraded_apart():
    traces = [
        chain(says("solver", "4"), judges("critic", True, True)),
        chain(says("solver", "4"), judges("critic", None, True, finish="error")),
        chain(says("solver", "5"), judges("critic", True, False)),
        chain({"agent": "solver"}, judges("critic", True, None)),
    ]
    balance = VerdictBalance(recall_right=0.5, recall_wrong=0.0, balanced_accuracy=0.25, unreadable=1, n=3)
    assert live_verdicts(traces, PIPELINE) == {"critic": LiveVerdicts(balance=balance, ungraded=1)}


def test_finish_reasons_by_agent():
    traces = [chain(says("solver", "4", finish="length"), says("reviser", FAILED)), chain(says("solver", "4"))]
    assert finish_reasons(traces) == {
        "solver": FinishReasons(stop=1, length=1, error=0),
        "reviser": FinishReasons(stop=0, length=0, error=1),
    }


def test_credit_is_averaged_over_turns_and_its_error_over_questions():
    traces = [
        chain(says("solver", "4", credit=1.0), says("solver", "4", credit=1.0), says("reviser", "4"), task="q0"),
        chain(says("solver", "5", credit=-1.0), says("solver", FAILED), task="q1"),
    ]
    found = credit_by_role(traces)  # solver: mean 1/3, sums of deviations 4/3 and -4/3, G = 2
    assert (found["solver"].mean, found["solver"].n, found["solver"].missing) == (pytest.approx(1 / 3), 3, 1)
    assert found["solver"].standard_error == pytest.approx((2 * 2 * (4 / 3) ** 2) ** 0.5 / 3)
    assert found["reviser"] == RoleCredit(mean=None, standard_error=None, n=0, missing=1)


def test_ungraded_traces_stay_in_the_denominator():
    traces = [debate({"a": "4"}, reward=reward) for reward in [1.0] * 6 + [0.0] * 3 + [None]]
    found = outcomes(traces)
    assert found == Outcomes(n=10, right=6, ungraded=1, accuracy=0.6, low=found.low, high=found.high)
    assert (found.low, found.high) == (pytest.approx(0.3127, abs=1e-4), pytest.approx(0.8318, abs=1e-4))  # Wilson, z = 1.96


def test_tokens_of_wrong_and_ungraded_traces_are_paid_by_the_right_ones():
    traces = [chain(says("a", "4", length=length), reward=reward) for length, reward in ((50, 1.0), (30, 0.0), (40, None))]
    assert token_use(traces) == TokenUse(total=120, per_question=40.0, per_correct=120.0)
    assert token_use(traces[1:]) == TokenUse(total=70, per_question=35.0, per_correct=None)


def mixed_traces():
    """A repaired trace of 9 tokens, one of 2 that failed at the reviser, and one that never started."""
    return [
        chain(says("solver", "5", credit=-0.5), judges("critic", False, False), says("reviser", "4", length=7), reward=1.0),
        chain(says("solver", "4", credit=0.5), judges("critic", None, True), says("reviser", FAILED), task="q1"),
        Trace(task=Task(id="q2", question="?", answer="4"), turns=()),
    ]


def test_summary_is_plain_data_that_json_keeps():
    found = summary(mixed_traces(), PIPELINE)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["outcomes"]["n"], found["outcomes"]["right"], found["outcomes"]["ungraded"]) == (3, 1, 2)
    assert found["token_use"] == {"total": 11, "per_question": 11 / 3, "per_correct": 11.0}
    assert [row["number"] for row in found["convergence"]] == [0, 2]
    assert found["flips"]["solver -> reviser"]["to_right"] == found["flips"]["solver -> reviser"]["unknown"] == 1
    assert found["live_verdicts"]["critic"]["balance"]["unreadable"] == 1


def printed(traces, roles):
    console = Console(width=120, file=io.StringIO())
    print_team(console, summary(traces, roles))
    return console.file.getvalue()


def test_team_is_printed_in_three_tables_with_missing_values_as_dashes():
    lines = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in printed(mixed_traces(), PIPELINE).splitlines()]
    assert ["reviser", "2", "1", "0", "50.0%", "-", "-", "-", "2"] in lines
    assert ["critic", "2", "0", "0", "50.0%", "50.0%", "-", "-", "2"] in lines
    assert ["solver", "2", "0", "0", "100.0%", "-", "+0.000", "0.500", "0"] in lines
    assert ["2", "2", "-", "50.0%", "50.0%", "0", "0", "1"] in lines
    assert ["solver -> reviser", "1", "0", "0", "0", "1"] in lines


def test_printing_says_when_no_answer_is_right():
    text = printed([debate({"a": "5", "b": "5"}, reward=0.0)], DEBATE)
    assert "0 of 1 right (0.0%, 95% 0.0% - 79.3%), 0 ungraded; tokens: 2.0 a question, no right answer" in text
    assert "from one answer" not in text  # one round: no flips, no table


def test_an_agent_of_another_team_is_refused():
    with pytest.raises(DataError, match=r"turn 0-z: agent 'z' is not in the team, expected one of \['critic', 'reviser'"):
        summary([debate({"z": "4"})], PIPELINE)


def test_no_traces_are_refused():
    with pytest.raises(DataError, match="no traces to summarise"):
        summary([], PIPELINE)
