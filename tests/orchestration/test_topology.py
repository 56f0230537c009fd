"""Who speaks, in which order and how often; whose answer is the team's; what is left of a form without some of its agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.topology import (
    Debate,
    Judged,
    MixtureOfAgents,
    Pipeline,
    Single,
    Topology,
    last_answer,
    vote,
)
from mas_hpc.types import Task, Turn, rounds_of

FOUR = ("solver", "critic", "reviser", "verifier")
ANSWERING = frozenset({"solver", "reviser", "a", "b", "c", "judge", "aggregator"})
Says = Callable[[str, int], Mapping[str, object]]


def rejecting(agent: str, time: int) -> Mapping[str, object]:
    """Answers are numbered by how often the agent has spoken; every verdict rejects."""
    return {"answer": f"{agent}{time}"} if agent in ANSWERING else {"verdict": False}


def accepting_at(judge: str, accepted: int) -> Says:
    """As rejecting, but `judge` accepts the time it is counted for."""
    return lambda agent, time: {"verdict": True} if (agent, time) == (judge, accepted) else rejecting(agent, time)


def play(topology: Topology, says: Says = rejecting) -> list[Turn]:
    """All turns until nobody speaks; the speakers of one state continue the same turn."""
    path: list[Turn] = []
    spoken: Counter[str] = Counter()
    while speakers := topology.next_speakers(path):
        parent = path[-1].id if path else None
        for name in speakers:
            path.append(turn(name, f"{len(path)}", parent, **says(name, spoken[name])))
            spoken[name] += 1
        assert len(path) < 100, "it never ends"
    return path


def turn(agent: str, name: str, parent: str | None, **read: object) -> Turn:
    return Turn(
        id=name, parent=parent, task_id="q", agent=agent, policy="p", index=0, prompt_ids=(1,), prompt_spans=(("", 1),),
        completion_ids=(2,), behavior_logprobs=(-1.0,), text="", finish="stop", committed=True, **read,
    )  # fmt: skip


def names(path: list[Turn]) -> tuple[str, ...]:
    return tuple(turn.agent for turn in path)


def answer_of(topology: Topology, says: Says = rejecting) -> str | None:
    return topology.answer([turn for turn in play(topology, says) if turn.agent in ANSWERING])


LOOPED = Pipeline(agents=FOUR, num_looped=2, max_rounds=3)
BEST_OF_3 = Pipeline(agents=("solver", "verifier"), num_looped=2, max_rounds=3)


@pytest.mark.parametrize(
    ("topology", "rounds"),
    [
        (Single(agent="a"), [("a",)]),
        (Single(agent="a", samples=3), [("a", "a", "a")]),
        (Pipeline(agents=FOUR), [(name,) for name in FOUR]),
        (Pipeline(agents=()), []),
        (LOOPED, [(name,) for name in (*FOUR, "reviser", "verifier", "reviser", "verifier")]),
        (BEST_OF_3, [(name,) for name in ("solver", "verifier") * 3]),
        (Debate(debaters=("a", "b"), rounds=2), [("a", "b"), ("a", "b")]),
        (Debate(debaters=("a", "b"), judge="judge", rounds=2), [("a", "b"), ("a", "b"), ("judge",)]),
        (Debate(debaters=("a",), rounds=3), [("a",), ("a",), ("a",)]),
        (MixtureOfAgents(proposers=("a", "b", "c"), aggregator="aggregator", layers=2),
         [("a", "b", "c"), ("a", "b", "c"), ("aggregator",)]),
        (Judged(topology=LOOPED, judge="critic"), [("solver",), ("critic",)]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)  # fmt: skip
def test_speakers_of_a_round_continue_the_same_turn_and_rounds_come_in_order(topology: Topology, rounds) -> None:
    assert [tuple(turn.agent for turn in members) for members in rounds_of(play(topology))] == rounds


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_a_loop_ends_when_its_last_agent_accepts(accepted: int) -> None:
    path = play(LOOPED, accepting_at("verifier", accepted))
    assert names(path) == (*FOUR, *("reviser", "verifier") * accepted)
    assert answer_of(LOOPED, accepting_at("verifier", accepted)) == f"reviser{accepted}"


def test_a_verdict_that_cannot_be_read_sends_back_as_a_rejection_does() -> None:
    def unreadable(agent: str, time: int) -> Mapping[str, object]:
        return rejecting(agent, time) if agent in ANSWERING else {"verdict": None}

    assert names(play(BEST_OF_3, unreadable)) == ("solver", "verifier") * 3


def test_only_the_last_agent_sends_back_but_any_verdict_may_stop() -> None:
    accepted = accepting_at("critic", 0)
    assert names(play(Pipeline(agents=FOUR), accepted)) == FOUR
    assert names(play(Pipeline(agents=FOUR, stop_when_accepted=True), accepted)) == ("solver", "critic")
    assert names(play(Pipeline(agents=FOUR, stop_when_accepted=True))) == FOUR


def test_the_latest_answer_counts_though_it_is_unreadable() -> None:
    def silent_reviser(agent: str, time: int) -> Mapping[str, object]:
        return {"answer": None} if agent == "reviser" else rejecting(agent, time)

    assert answer_of(Pipeline(agents=FOUR)) == "reviser0"
    assert answer_of(Pipeline(agents=FOUR), silent_reviser) is None
    assert last_answer([]) is None and vote([]) is None


def said(*answers: str | None) -> list[Turn]:
    """One round of answers."""
    return [turn("a", f"{place}", None, answer=answer) for place, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (("7", "8", "8"), "8"),
        (("7", "8"), "7"),  # a tie goes to the first seen
        (("8", "7", "7", "8"), "8"),
        ((None, None, "7"), "7"),  # no answer never outvotes an answer
        ((None, None), None),
    ],
)
def test_a_vote_is_by_majority_and_no_answer_is_no_vote(answers: tuple[str | None, ...], winner: str | None) -> None:
    for topology in (Single(agent="a", samples=3), Debate(debaters=("a", "b"), rounds=1)):
        assert topology.answer(said(*answers)) == winner


def test_what_cannot_be_read_is_never_right() -> None:
    assert VerifiableJudge().outcome(Task(id="q", question="", answer="7"), vote(said(None, None))) == 0.0


def test_only_the_last_round_of_a_debate_is_counted() -> None:
    def converging(agent: str, time: int) -> Mapping[str, object]:
        return {"answer": "8" if time or agent == "c" else "7"}  # 7 7 8, then 8 8 8

    assert answer_of(Debate(debaters=("a", "b", "c"), rounds=1), converging) == "7"
    assert answer_of(Debate(debaters=("a", "b", "c"), rounds=2), converging) == "8"


def test_a_judge_or_an_aggregator_overrules_the_majority_and_its_silence_is_no_answer() -> None:
    for closing, topology in (
        ("judge", Debate(debaters=("a", "b"), judge="judge", rounds=1)),
        ("aggregator", MixtureOfAgents(proposers=("a", "b"), aggregator="aggregator", layers=1)),
    ):
        for answer in ("9", None):
            said_last = {"a": "7", "b": "7", closing: answer}
            assert answer_of(topology, lambda agent, time, said_last=said_last: {"answer": said_last[agent]}) == answer


def restricted(topology: Topology, *present: str, says: Says = rejecting) -> tuple[str, ...]:
    """Who speaks when only `present` are there."""
    return names(play(topology.restricted(frozenset(present), ANSWERING), says))


@pytest.mark.parametrize(
    ("present", "speakers"),
    [
        (FOUR, ("solver", "critic", "reviser")),  # nobody reads the verifier
        (("solver", "critic", "verifier"), ("solver",)),
        (("solver", "reviser"), ("solver", "reviser")),
        (("critic", "reviser"), ("critic", "reviser")),
        (("critic", "verifier"), ()),
        ((), ()),
    ],
)
def test_absent_agents_of_a_pipeline_are_skipped_and_judges_whom_nobody_reads_with_them(present, speakers) -> None:
    assert restricted(Pipeline(agents=FOUR), *present) == speakers
    assert restricted(Pipeline(agents=FOUR, num_looped=2, max_rounds=1), *present) == speakers


@pytest.mark.parametrize(
    ("present", "speakers"),
    [
        (FOUR, (*FOUR, *("reviser", "verifier") * 2)),
        (("solver", "reviser", "verifier"), ("solver", *("reviser", "verifier") * 3)),
        (("reviser", "verifier"), ("reviser", "verifier") * 3),
        (("solver", "critic", "reviser"), ("solver", "critic", "reviser")),  # nobody sends back
        (("solver", "critic", "verifier"), ("solver",)),  # nobody to send back to
        (("verifier",), ()),
    ],
)
def test_a_loop_needs_the_agent_that_sends_back_and_one_that_answers_again(present, speakers) -> None:
    assert restricted(LOOPED, *present) == speakers


def test_a_longer_loop_keeps_the_present_agents_of_it() -> None:
    loop = Pipeline(agents=FOUR, num_looped=4, max_rounds=2)
    assert restricted(loop, "solver", "critic", "verifier") == ("solver", "critic", "verifier") * 2
    assert restricted(loop, "solver", "verifier", says=accepting_at("verifier", 0)) == ("solver", "verifier")


def test_best_of_n_without_its_verifier_is_one_try_and_without_its_solver_nothing() -> None:
    assert restricted(BEST_OF_3, "solver") == ("solver",)
    assert restricted(BEST_OF_3, "verifier") == ()


def test_a_critic_stops_a_pipeline_early_in_every_coalition_that_holds_it() -> None:
    stops = Pipeline(agents=FOUR, stop_when_accepted=True)
    accepted = accepting_at("critic", 0)
    assert restricted(stops, *FOUR, says=accepted) == ("solver", "critic")
    assert restricted(stops, "solver", "reviser", says=accepted) == ("solver", "reviser")


def test_one_agent_alone_is_there_or_nobody_is() -> None:
    for topology in (Single(agent="a"), Single(agent="a", samples=2)):
        assert topology.restricted(frozenset({"a", "b"}), ANSWERING) == topology
        assert restricted(topology, "b") == () and topology.restricted(frozenset(), ANSWERING).answer([]) is None


def test_without_its_judge_a_debate_is_decided_by_the_majority_and_without_debaters_by_the_judge_alone() -> None:
    debate = Debate(debaters=("a", "b"), judge="judge", rounds=2)
    assert restricted(debate, "a", "judge") == ("a", "a", "judge")
    assert restricted(debate, "a", "b") == ("a", "b", "a", "b")
    assert answer_of(debate.restricted(frozenset("ab"), ANSWERING)) == "a1"
    assert restricted(debate, "judge") == ("judge",) and restricted(debate) == ()


def test_without_its_aggregator_a_mixture_is_decided_by_the_majority_of_the_last_layer() -> None:
    mixture = MixtureOfAgents(proposers=("a", "b"), aggregator="aggregator", layers=2)
    assert restricted(mixture, "b", "aggregator") == ("b", "b", "aggregator")
    assert answer_of(mixture.restricted(frozenset("ab"), ANSWERING)) == "a1"
    assert restricted(mixture, "aggregator") == ("aggregator",) and restricted(mixture) == ()


def test_a_judged_form_is_restricted_inside_and_still_ends_with_its_judge() -> None:
    judged = Judged(topology=Pipeline(agents=FOUR), judge="critic")
    assert restricted(judged, "solver", "critic", "reviser") == ("solver", "critic")
    assert restricted(judged, "solver", "reviser") == ("solver", "reviser")
    assert judged.answer(said("7")) == "7"


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Pipeline, frozenset[str], dict[tuple[str, int], bool], frozenset[str]]:
    """A pipeline, who of it answers, what its judges say, and a coalition."""
    agents = tuple("abcde"[: draw(st.integers(1, 5))])
    answering = frozenset(draw(st.sets(st.sampled_from(agents))))
    looped = draw(st.integers(0, len(agents))) if agents[-1] not in answering else 0
    pipeline = Pipeline(
        agents=agents, num_looped=looped, max_rounds=draw(st.integers(1, 3)), stop_when_accepted=draw(st.booleans())
    )
    verdicts = {(agent, time): draw(st.booleans()) for agent in agents for time in range(3)}
    return pipeline, answering, verdicts, frozenset(draw(st.sets(st.sampled_from(agents))))


@given(pipelines())
@settings(max_examples=200, deadline=None)
def test_what_is_left_out_of_a_pipeline_never_changes_its_answer(case) -> None:
    pipeline, answering, verdicts, present = case

    def says(agent: str, time: int) -> Mapping[str, object]:
        return {"answer": f"{agent}{time}"} if agent in answering else {"verdict": verdicts[agent, time]}

    def given_by(topology: Topology) -> list[tuple[str, str | None]]:
        return [(turn.agent, turn.answer) for turn in play(topology, says) if turn.agent in answering]

    assert given_by(pipeline.restricted(frozenset(pipeline.agents), answering)) == given_by(pipeline)
    alone = play(pipeline.restricted(present, answering), says)
    assert {turn.agent for turn in alone} <= present
    if answering.isdisjoint(present):
        assert alone == []
