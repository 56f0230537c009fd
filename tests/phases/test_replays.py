"""Many games at once: equal requests once, what was sampled kept, and nothing depends on what is played beside."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.credit_assignment.credit import Credit, CreditMethod, Question
from mas_hpc.data.value_store import ValueStore
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play
from mas_hpc.orchestration.events import run as serve
from mas_hpc.orchestration.topology import Debate
from mas_hpc.phases.replays import Game, noted, play_games
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import Behaviour, ScriptedEngine
from tests.phases.conftest import NAMES, TASKS, chance, game

FAILED = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")


def keeping(one: Game, store: ValueStore) -> Game:
    """The game with its outcomes on disk."""
    return replace(one, outcomes=store.of)


def credits_of(
    games: Sequence[Game], engine: ScriptedEngine, store: ValueStore, *, method: CreditMethod = "shapley", max_live: int = 9
) -> tuple[list[Credit | None], Counter[str]]:
    """As a credit run does it."""
    requests: Counter[str] = Counter()
    numbered = [(one.task.id, keeping(one, store).credit(method)) for one in games]
    try:
        return play_games(engine, numbered, max_live=max_live, requests=requests, on_answers=store.flush), requests
    finally:
        store.flush()


def test_two_episodes_of_a_question_share_one_coalition_tree(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    engine = ScriptedEngine(chance, tokenizer)
    found, requests = credits_of([game(trace, how) for trace in traces], engine, ValueStore(tmp_path, rank=0))
    # The tree has 7 nodes. An episode asks for the coalitions S, R, SR, CR and SCR once: the others play the same.
    assert requests["sampled"] == len(engine.requests) == 4 * 2 * 7
    assert requests["asked"] == 4 * 2 * 2 * (1 + 1 + 2 + 2 + 3)
    assert requests["tokens"] == sum(len(chance(request)) for request in engine.requests)
    assert found[0] == found[1] and len({credit.attribution.phi for credit in found if credit}) > 1


@pytest.mark.parametrize("method", ["shapley", "loo", "first_error", "reward_blame"])
def test_credit_does_not_depend_on_the_order_of_games_nor_on_how_many_are_live(
    how: Play, traces, tokenizer, tmp_path: Path, method: CreditMethod
) -> None:
    games = [game(trace, how, "masked") for trace in traces]
    expected, _ = credits_of(games, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path / "0", rank=0), method=method)
    for number, (order, max_live) in enumerate([(range(8), 1), (range(7, -1, -1), 3), ((3, 0, 7, 4, 1, 6, 2, 5), 2)], 1):
        store, engine = ValueStore(tmp_path / f"{number}", rank=0), ScriptedEngine(chance, tokenizer)
        found, _ = credits_of([games[place] for place in order], engine, store, method=method, max_live=max_live)
        assert found == [expected[place] for place in order]


def test_known_outcomes_are_not_sampled_again(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    games = [game(trace, how, "resample") for trace in traces]
    first, _ = credits_of(games, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path, rank=0))
    engine = ScriptedEngine(chance, tokenizer)
    again, requests = credits_of(games, engine, ValueStore(tmp_path, rank=0))
    assert again == first and engine.requests == [] and not requests
    leave_one_out, _ = credits_of(games, engine, ValueStore(tmp_path, rank=0), method="loo")
    assert engine.requests == [] and leave_one_out != first, "other methods ask for the same coalitions"


def interrupted(after: int) -> Behaviour:
    """Ctrl-C after so many completions."""
    served: list[Request] = []

    def behave(request: Request) -> str:
        served.append(request)
        if len(served) > after:
            raise KeyboardInterrupt
        return chance(request)

    return behave


def test_a_killed_run_goes_on_where_it_was(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    games = [game(trace, how) for trace in traces]
    whole = ScriptedEngine(chance, tokenizer)
    expected, _ = credits_of(games, whole, ValueStore(tmp_path / "whole", rank=0), max_live=1)
    file = tmp_path / "killed" / "values.rank0.jsonl"
    with pytest.raises(KeyboardInterrupt):
        killed = ValueStore(file.parent, rank=0)
        credits_of(games, ScriptedEngine(interrupted(30), tokenizer), killed, max_live=1)
    assert len(file.read_bytes().splitlines()) > 16
    file.write_bytes(file.read_bytes()[:-7])  # the machine went down while it wrote
    rest = ScriptedEngine(chance, tokenizer)
    found, _ = credits_of(games, rest, ValueStore(file.parent, rank=0), max_live=1)
    assert found == expected
    assert 0 < len(rest.requests) < len(whole.requests) and set(rest.requests) < set(whole.requests)


def test_what_two_ranks_have_sampled_is_known_to_each(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    games = [game(trace, how) for trace in traces]
    for rank, mine in ((0, games[:4]), (1, games[4:])):
        credits_of(mine, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path, rank=rank))
    engine = ScriptedEngine(chance, tokenizer)
    expected, _ = credits_of(games, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path / "alone", rank=0))
    for rank in (0, 1):
        assert credits_of(games, engine, ValueStore(tmp_path, rank=rank))[0] == expected
    assert engine.requests == []


def test_a_question_whose_every_replay_fails_has_no_credit_and_leaves_the_others_alone(
    how: Play, traces, tokenizer, tmp_path: Path
) -> None:
    games = [game(trace, how) for trace in traces]
    expected, _ = credits_of(games, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path / "whole", rank=0))
    broken = {turn.seed for one in games[:2] for turn in first_requests(one, tokenizer)}

    def failing(request: Request) -> Completion | str:
        return FAILED if request.seed in broken else chance(request)

    found, _ = credits_of(games, ScriptedEngine(failing, tokenizer), ValueStore(tmp_path / "failed", rank=0))
    assert found == [None, None, *expected[2:]]
    engine = ScriptedEngine(chance, tokenizer)
    again, _ = credits_of(games, engine, ValueStore(tmp_path / "failed", rank=0))
    assert again == expected and {request.seed for request in engine.requests} >= broken, "failures are tried again"


def first_requests(one: Game, tokenizer) -> list[Request]:
    """What the game asks for when everybody plays."""
    engine = ScriptedEngine(chance, tokenizer)
    serve(engine, one.counterfactual.mean(frozenset(NAMES), {}))
    return [request for request in engine.requests if request.policy == "solver"]


def test_half_of_the_replays_may_fail(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    one = game(traces[0], how, num_replays=4)
    seeds = [request.seed for request in first_requests(one, tokenizer)]
    engine = ScriptedEngine(lambda r: FAILED if r.seed in seeds[:2] else chance(r), tokenizer)
    [failed], _ = credits_of([one], engine, ValueStore(tmp_path, rank=0))
    values = [json.loads(line) for line in (tmp_path / "values.rank0.jsonl").read_text().splitlines()]
    replays = Counter(replay for _, coalition, replay, _ in values if "solver" in coalition)
    assert failed is not None and set(replays) == {2, 3}


def test_after_each_batch_the_outcomes_that_it_decided_are_there_to_be_kept(
    how: Play, traces, tokenizer, tmp_path: Path
) -> None:  # fmt: skip
    store, one, known = ValueStore(tmp_path, rank=0), game(traces[0], how), []
    outcomes = store.of(subject(one, frozenset()))
    play_games(
        ScriptedEngine(chance, tokenizer), [(one.task.id, keeping(one, store).credit("shapley"))],
        max_live=1, requests=Counter(), on_answers=lambda: known.append(len(outcomes)),
    )  # fmt: skip
    # 2 replays of nobody, of S and R by one call, then of SR and CR by two calls, then of SCR by three.
    assert known == [2 * 3, 2 * 5, 2 * 6]


def test_games_are_credited_in_their_own_places_when_questions_alternate(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    mixed = [traces[place] for place in (0, 2, 1, 4)]
    games = [game(trace, how) for trace in mixed]
    found, _ = credits_of(games, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path, rank=0), method="outcome")
    assert [credit.rewards[0] for credit in found if credit] == [trace.reward for trace in mixed]


def test_noted_steps_show_what_was_served_and_return_as_before(tokenizer, how: Play, traces) -> None:
    engine, one = ScriptedEngine(chance, tokenizer), game(traces[0], how).counterfactual
    served: list[list[Completion]] = []
    outcome = serve(engine, noted(one.outcome(frozenset(NAMES), 0), served.append))
    assert outcome == serve(engine, one.outcome(frozenset(NAMES), 0))
    assert [[completion.text for completion in batch] for batch in served] == [[chance(r)] for r in engine.requests[:3]]


# ---- what an outcome belongs to


def subject(one: Game, question: Question) -> str:
    """Where the game looks for outcomes of the question."""
    return one._subject(one.path.turns, question)


def test_a_coalition_that_plays_anew_belongs_to_the_question_and_all_else_to_the_path(how: Play, traces) -> None:
    one, two = traces[:2]
    assert one.task == two.task and one.path != two.path
    everybody = frozenset(NAMES)
    for value in ("removal", "replacement"):
        assert subject(game(one, how, value), everybody) == subject(game(two, how, value), everybody)
    for value in ("masked", "resample"):
        assert subject(game(one, how, value), everybody) != subject(game(two, how, value), everybody)
    distinct = {subject(game(one, how, value), everybody) for value in ("removal", "replacement", "masked", "resample")}
    assert len(distinct) == 4


def test_a_prefix_is_worth_the_same_under_every_value_function(how: Play, traces) -> None:
    found = {subject(game(traces[0], how, value), 2) for value in ("removal", "replacement", "masked", "resample")}
    assert len(found) == 1 and found.isdisjoint({subject(game(traces[1], how), 2)})


def test_a_prefix_belongs_to_the_turns_that_it_keeps(how: Play, traces) -> None:
    one = game(traces[0], how)
    whole = [subject(one, kept) for kept in range(5)]
    assert len(set(whole)) == 5
    for place, turn in enumerate(one.path.turns):
        turns = list(one.path.turns)
        turns[place] = replace(turn, completion_ids=(*turn.completion_ids, 1))
        other = replace(one, path=replace(one.path, turns=tuple(turns)))
        assert [subject(other, kept) == whole[kept] for kept in range(5)] == [kept <= place for kept in range(5)]
    assert subject(game(traces[2], how), 0) != whole[0], "another question"


def test_the_empty_prefix_is_sampled_once_for_all_episodes_of_a_question(
    how: Play, traces, tokenizer, tmp_path: Path
) -> None:  # fmt: skip
    store, engine = ValueStore(tmp_path, rank=0), ScriptedEngine(chance, tokenizer)
    for trace in traces[:2]:
        one = keeping(game(trace, how), store)
        path = replace(one.path, outcome=0.0, localized=True)  # a failure asks for its baseline alone
        assert serve(engine, replace(one, path=path).credit("first_error")) is not None
        assert len(engine.requests) == 2 * 4
    assert [question for question, _ in store.of(subject(one, 0))] == [0, 0]


def test_outcomes_of_another_seed_or_another_distribution_are_others(how: Play, traces) -> None:
    hot = replace(how.sampling, temperature=1.5)
    plays = [
        how,
        replace(how, seed=1),
        *(replace(how, sampling=s) for s in (hot, replace(hot, top_p=0.9), replace(hot, top_k=5))),
    ]
    for question in (frozenset(NAMES), 1):
        assert len({subject(game(traces[0], play), question) for play in plays}) == 5


# ---- alternatives with their values


def copying(tokenizer) -> Behaviour:
    """The reviser copies the solver, so a message of the solver is worth 1 or 0."""

    def behave(request: Request) -> str:
        return tokenizer.decode(request.prompt_ids)[5:8] if request.policy == "reviser" else chance(request)

    return behave


def policies(engine: ScriptedEngine) -> Counter[str]:
    """How many messages of each were sampled."""
    return Counter(request.policy for request in engine.requests)


def test_siblings_are_the_recorded_message_and_its_alternatives_with_the_values_of_what_follows(
    how: Play, traces, tokenizer
) -> None:  # fmt: skip
    engine = ScriptedEngine(copying(tokenizer), tokenizer)
    for trace in traces:
        [(recorded, _), *fresh] = found = serve(engine, game(trace, how, "masked").siblings(0, 6))
        assert recorded is trace.path[0] and len(fresh) == 6
        assert all(value == float(turn.text == "012") for turn, value in found)
        assert len({turn.seed for turn, _ in found}) == 7
    assert policies(engine) == {"solver": 8 * 6, **dict.fromkeys(NAMES[1:], 8 * 7 * 2)}


def test_equal_alternatives_are_continued_once(how: Play, traces, tokenizer) -> None:
    requests: Counter[str] = Counter()
    engine, one = ScriptedEngine(copying(tokenizer), tokenizer), game(traces[0], how)
    [found] = play_games(engine, [(one.task.id, one.siblings(0, 6))], max_live=1, requests=requests)
    assert {turn.text for turn, _ in found} == {"012", "111"}
    assert policies(engine) == {"solver": 6, **dict.fromkeys(NAMES[1:], 2 * 2)}


def test_outcomes_of_siblings_are_kept_and_only_their_texts_are_sampled_again(
    how: Play, traces, tokenizer, tmp_path: Path
) -> None:
    store, first, engine = ValueStore(tmp_path, rank=0), *(ScriptedEngine(chance, tokenizer) for _ in range(2))
    expected = serve(first, keeping(game(traces[0], how), store).siblings(1, 3))
    assert policies(first) == {"critic": 3, "reviser": 4 * 2, "verifier": 4 * 2}
    store.flush()
    assert serve(engine, keeping(game(traces[0], how), ValueStore(tmp_path, rank=0)).siblings(1, 3)) == expected
    assert policies(engine) == {"critic": 3}


def test_siblings_take_what_credit_has_sampled_after_the_recorded_message(how: Play, traces, tokenizer) -> None:
    trace = next(trace for trace in traces if trace.reward == 0.0)
    one, verdict = game(trace, how), trace.path[1].text
    credit = serve(ScriptedEngine(chance, tokenizer), one.credit("reward_blame"))
    engine = ScriptedEngine(
        lambda r: {"===+": "!!!-", "!!!-": "===+"}[verdict] if r.policy == "critic" else chance(r), tokenizer
    )
    [(recorded, value), (sibling, _)] = serve(engine, one.siblings(1, 1))
    assert credit is not None and value == credit.values[2]
    assert recorded.text != sibling.text and policies(engine) == {"critic": 1, "reviser": 2, "verifier": 2}
    engine.requests.clear()
    serve(engine, game(trace, how).siblings(1, 1))
    assert policies(engine) == {"critic": 1, "reviser": 4, "verifier": 4}, "another game has outcomes of its own"


def test_an_alternative_inside_a_round_is_worth_what_follows_in_its_place(how: Play, tokenizer) -> None:
    agents = {
        name: Agent(name=name, role=ROLES["debater"], policy=name, sees="transcript", max_new_tokens=16)
        for name in ("ada", "ben")
    }
    debate = replace(how, team=replace(how.team, agents=agents, topology=Debate(debaters=("ada", "ben"), rounds=2)))
    [trace] = collect(
        ScriptedEngine(lambda request: "111", tokenizer), TASKS[:1], debate, max_live=1, on_trace=lambda trace: None
    )
    engine = ScriptedEngine(lambda request: "012", tokenizer)
    one = game(trace, debate, "masked")
    values = [[value for _, value in serve(engine, one.siblings(place, 1))] for place in (2, 3)]
    # ada's 012 is followed by a fresh 012 of ben; beside ada's 111 it is the second of a tie. So is ben's own 012.
    assert values == [[0.0, 1.0], [0.0, 0.0]]


def test_a_sibling_whose_every_continuation_failed_has_no_value(how: Play, traces, tokenizer) -> None:
    engine, one = ScriptedEngine(lambda request: FAILED, tokenizer), game(traces[0], how)
    [(_, recorded), (sibling, value)] = serve(engine, one.siblings(3, 1))
    assert recorded == traces[0].reward and sibling.finish == "error" and math.isnan(value)
    assert all(math.isnan(value) for _, value in serve(engine, one.siblings(2, 1)))
