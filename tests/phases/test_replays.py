"""Many games at once: equal requests once, what was sampled kept, and nothing depends on what is played beside."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import CompactTemplate
from mas_hpc.config import ModelConfig
from mas_hpc.credit_assignment.credit import Credit, CreditMethod, Question
from mas_hpc.credit_assignment.credit import Path as CreditPath
from mas_hpc.data.value_store import ValueStore
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.collect import run as serve
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.replay import ValueFunction
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.phases.replays import Game, noted, together
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import Behaviour, ScriptedEngine
from mas_hpc.types import Task, Trace

NAMES = ("solver", "critic", "reviser", "verifier")
FAILED = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")
TASKS = [Task(id=name, question="modulo 4", answer="012", compact="132", grader="ring") for name in "pqrs"]


def chance(request: Request) -> str:
    """Right or wrong, accepted or not, by all of the request."""
    record = repr((request.prompt_ids, request.policy, request.seed)).encode()
    given = ("===+", "!!!-") if request.policy in ("critic", "verifier") else ("012", "111")
    return given[hashlib.blake2b(record, digest_size=1).digest()[0] % 2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(ModelConfig(), seed=0)[1]


@pytest.fixture(scope="module")
def how(tokenizer) -> Play:
    agents = {name: Agent(name=name, role=ROLES[name], policy=name, sees="transcript", max_new_tokens=16) for name in NAMES}
    team = Team(agents=agents, topology=Pipeline(agents=NAMES), template=CompactTemplate(tokenizer))
    return Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=0)


@pytest.fixture(scope="module")
def traces(how: Play, tokenizer) -> list[Trace]:
    """Two episodes of each question."""
    sampling = replace(how.sampling, episodes=2)
    engine = ScriptedEngine(chance, tokenizer)
    found = collect(engine, TASKS, replace(how, sampling=sampling), max_live=8, on_trace=lambda trace: None)
    assert {trace.reward for trace in found} == {0.0, 1.0}
    return found


def game(trace: Trace, how: Play, value: ValueFunction = "removal", num_replays: int = 2) -> Game:
    path = CreditPath(turns=trace.path, players=NAMES, outcome=float(trace.reward or 0.0))
    return Game(task=trace.task, path=path, how=how, value=value, num_replays=num_replays)


def credits_of(
    games: Sequence[Game], engine: ScriptedEngine, store: ValueStore, *, method: CreditMethod = "shapley", max_live: int = 9
) -> tuple[list[Credit | None], Counter[str]]:
    """As a credit run does it."""
    requests: Counter[str] = Counter()
    numbered = [(one.task.id, one.credit(method, store.of)) for one in games]
    steps = together(numbered, max_live=max_live, requests=requests, on_wave=store.flush)
    try:
        return serve(engine, steps), requests
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
    steps = together(
        [(one.task.id, one.credit("shapley", store.of))],
        max_live=1, requests=Counter(), on_wave=lambda: known.append(len(outcomes)),
    )  # fmt: skip
    serve(ScriptedEngine(chance, tokenizer), steps)
    # 2 replays of nobody, of S and R by one call, then of SR and CR by two calls, then of SCR by three.
    assert known == [2 * 3, 2 * 5, 2 * 6]


def test_games_are_credited_in_their_own_places_when_questions_alternate(how: Play, traces, tokenizer, tmp_path: Path) -> None:
    mixed = [traces[place] for place in (0, 2, 1, 4)]
    games = [game(trace, how) for trace in mixed]
    found, _ = credits_of(games, ScriptedEngine(chance, tokenizer), ValueStore(tmp_path, rank=0), method="outcome")
    assert [credit.rewards[0] for credit in found if credit] == [trace.reward for trace in mixed]


# ---- what an outcome belongs to


def subject(one: Game, question: Question) -> str:
    return one.subject(question)


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


def test_outcomes_of_another_seed_or_another_distribution_are_others(how: Play, traces) -> None:
    hot = replace(how.sampling, temperature=1.5)
    plays = [
        how,
        replace(how, seed=1),
        *(replace(how, sampling=s) for s in (hot, replace(hot, top_p=0.9), replace(hot, top_k=5))),
    ]
    for question in (frozenset(NAMES), 1):
        assert len({subject(game(traces[0], play), question) for play in plays}) == 5


def test_noted_steps_show_what_was_served_and_return_as_before(tokenizer, how: Play, traces) -> None:
    engine, one = ScriptedEngine(chance, tokenizer), game(traces[0], how).counterfactual
    served: list[list[Completion]] = []
    outcome = serve(engine, noted(one.outcome(frozenset(NAMES), 0), served.append))
    assert outcome == serve(engine, one.outcome(frozenset(NAMES), 0))
    assert [[completion.text for completion in batch] for batch in served] == [[chance(r)] for r in engine.requests[:3]]
