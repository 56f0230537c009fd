"""Credit of messages by every method, worked out by hand, and what it costs in questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.credit_assignment.credit import CREDIT, Credit, CreditMethod, Path, Question, prefix_values
from mas_hpc.credit_assignment.error_localization import Fault
from mas_hpc.credit_assignment.estimate import answered
from mas_hpc.credit_assignment.message_rewards import MessageRewardSettings
from mas_hpc.types import Turn

PLAYERS = ("solver", "critic", "reviser")
SETTINGS = MessageRewardSettings(epsilon=0.15)
Worth = Callable[[frozenset[str]], float]


def turn(agent: str, local_reward: float | None = None) -> Turn:
    return Turn(
        id=agent, parent=None, task_id="q", agent=agent, policy="p", index=0, prompt_ids=(1,), prompt_spans=(("", 1),),
        completion_ids=(2,), behavior_logprobs=(-1.0,), text="", finish="stop", committed=True, local_reward=local_reward,
    )  # fmt: skip


def path(*agents: str, outcome: float, **fields) -> Path:
    given = {"players": PLAYERS, "settings": SETTINGS} | fields
    return Path(turns=tuple(turn(agent) for agent in agents), outcome=outcome, **given)


def credited(
    method: CreditMethod, of: Path, worth: Worth = lambda coalition: 0.0, prefixes: Sequence[float] = ()
) -> tuple[Credit, list[Question]]:
    """The credit, and every question that was asked."""
    asked: list[Question] = []

    def value(questions: Sequence[Question]) -> list[float]:
        asked.extend(questions)
        return [prefixes[question] if isinstance(question, int) else worth(question) for question in questions]

    return answered(CREDIT[method](of), value), asked


def additive(weights: Mapping[str, float]) -> Worth:
    return lambda coalition: math.fsum(weights[player] for player in coalition)


def together(*needed: str) -> Worth:
    """1 when all of them are there, else 0."""
    return lambda coalition: float(coalition >= set(needed))


def fault(message: int) -> Fault:
    return Fault(agent="solver", turn=message, step=None, method="test", evidence="")


def test_the_table_has_every_method() -> None:
    assert set(CREDIT) == set(get_args(CreditMethod))


# ---- methods that ask nothing


def test_the_outcome_is_everybodys() -> None:
    for outcome in (0.0, 1.0):
        assert credited("outcome", path("solver", "critic", outcome=outcome)) == (Credit(rewards=(outcome, outcome)), [])


def test_local_credit_is_the_roles_own_reward_and_missing_where_there_is_none() -> None:
    turns = (turn("solver", 1.0), turn("critic", 0.0), turn("reviser", None))
    credit, asked = credited("local", Path(turns=turns, players=PLAYERS, outcome=1.0))
    assert credit.rewards[:2] == (1.0, 0.0) and math.isnan(credit.rewards[2]) and asked == []


def test_a_process_reward_model_scores_each_message() -> None:
    scores = (0.9, 0.2)
    assert credited("process_reward", path("solver", "critic", outcome=0.0, scores=scores)) == (Credit(rewards=scores), [])
    with pytest.raises(AssertionError, match="0 scores of 1 messages"):
        credited("process_reward", path("solver", outcome=0.0))


# ---- credit of agents


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_shapley_splits_what_two_earn_only_together_and_each_share_among_the_messages(outcome: float) -> None:
    credit, asked = credited(
        "shapley", path("solver", "critic", "solver", outcome=outcome), together("solver", "critic")
    )  # fmt: skip
    assert credit.rewards == pytest.approx((0.25, 0.5, 0.25), abs=1e-12)
    assert credit.attribution is not None and credit.attribution.phi == pytest.approx((0.5, 0.5, 0.0), abs=1e-12)
    assert credit.unplaced == 0.0 and credit.values == ()
    everybody = [frozenset(members) for size in range(4) for members in combinations(PLAYERS, size)]
    assert sorted(map(sorted, asked)) == sorted(map(sorted, everybody)), "each coalition once"


def test_leave_one_out_gives_the_whole_to_each_of_two_who_need_each_other() -> None:
    credit, asked = credited("loo", path("solver", "critic", "solver", outcome=1.0), together("solver", "critic"))
    assert credit.rewards == (0.5, 1.0, 0.5) and len(asked) == 5
    assert credit.attribution is not None and not credit.attribution.conserving


def test_leave_one_out_gives_nothing_to_two_who_can_stand_in_for_each_other() -> None:
    credit, _ = credited("loo", path("solver", "reviser", outcome=1.0), lambda coalition: float(len(coalition) > 1))
    assert credit.rewards == (0.0, 0.0)


@pytest.mark.parametrize("method", ["shapley", "loo", "reward_blame"])
def test_credit_of_an_agent_without_a_message_is_kept_apart(method: CreditMethod) -> None:
    weights = {"solver": 0.5, "critic": 0.25, "reviser": 0.25}
    credit, _ = credited(method, path("solver", "critic", outcome=1.0), additive(weights), prefixes=(0.0, 0.5))
    assert credit.rewards == pytest.approx((0.5, 0.25), abs=1e-12)
    assert credit.unplaced == pytest.approx(0.25, abs=1e-12)


def test_a_saboteur_has_negative_credit() -> None:
    credit, _ = credited(
        "shapley", path(*PLAYERS, outcome=0.0), additive({"solver": 0.75, "critic": -0.5, "reviser": 0.0})
    )  # fmt: skip
    assert credit.rewards == pytest.approx((0.75, -0.5, 0.0), abs=1e-12)


# ---- blame


FAILED = ("solver", "critic", "reviser", "critic")
VALUES = (0.5, 0.5, 0.1, 0.4)  # then the outcome, 0: message 1 loses 0.4, message 2 wins 0.3 back, message 3 loses 0.4


def test_the_first_drop_is_blamed_for_the_whole_failure_and_nobody_else() -> None:
    credit, asked = credited("first_error", path(*FAILED, outcome=0.0), prefixes=VALUES)
    assert credit.rewards == pytest.approx((0.0, -0.5, 0.0, 0.0), abs=1e-12)
    assert credit.failure is not None and credit.failure.first_error == 1
    assert credit.fault is not None and (credit.fault.agent, credit.fault.turn) == ("critic", 1)
    assert set(asked) <= {0, 1, 2, 3} and len(asked) == len(set(asked)), "the outcome is known"


def test_without_a_drop_the_blame_is_spread_evenly() -> None:
    for method in ("first_error", "reward_blame"):
        credit, _ = credited(method, path(*FAILED, outcome=0.0), prefixes=(0.1, 0.1, 0.1, 0.1))
        assert credit.rewards == pytest.approx((-0.025,) * 4, abs=1e-12)
        assert credit.fault is None and credit.failure is not None and credit.failure.first_error is None


def test_a_success_blames_nobody_and_asks_nothing() -> None:
    credit, asked = credited("first_error", path(*FAILED, outcome=1.0))
    assert credit.rewards == (0.0,) * 4 and credit.failure is None and asked == []


def test_a_located_fault_takes_the_blame_for_one_question() -> None:
    of = path(*FAILED, outcome=0.0, localized=True, fault=fault(2))
    credit, asked = credited("first_error", of, prefixes=VALUES)
    assert credit.rewards == pytest.approx((0.0, 0.0, -0.5, 0.0), abs=1e-12)
    assert asked == [0] and credit.values == () and credit.fault == fault(2)


def test_a_localizer_that_found_nothing_spreads_the_blame() -> None:
    of = path(*FAILED, outcome=0.0, localized=True)
    for method in ("first_error", "reward_blame"):
        credit, _ = credited(method, of, prefixes=VALUES)
        assert credit.rewards == pytest.approx((-0.125,) * 4, abs=1e-12)
        assert credit.fault is None


def test_failure_blames_the_first_error_and_later_harm_and_praises_the_repair() -> None:
    # praise 0.5 * 0.3 = 0.15; the faults pay 0.5 + 0.15 in proportion 1 : 0.5 * 0.4.
    credit, asked = credited("reward_blame", path(*FAILED, outcome=0.0), prefixes=VALUES)
    assert credit.rewards == pytest.approx((0.0, -0.65 / 1.2, 0.15, -0.65 * 0.2 / 1.2), abs=1e-12)
    assert credit.failure is not None
    assert (credit.failure.first_error, credit.failure.repairs, credit.failure.harmful) == (1, (2,), (3,))
    assert asked == [0, 1, 2, 3] and credit.values == (*VALUES, 0.0) and credit.attribution is None


def test_failure_with_a_located_fault_spares_what_came_before_it() -> None:
    # message 3 alone: the drop of message 1 and the rise of message 2 come before it.
    credit, _ = credited("reward_blame", path(*FAILED, outcome=0.0, localized=True, fault=fault(3)), prefixes=VALUES)
    assert credit.rewards == pytest.approx((0.0, 0.0, 0.0, -0.5), abs=1e-12)


def test_success_refines_shapley_credit_by_the_progress_of_messages() -> None:
    # solver's messages bring 0.2 and 0.8 of 1; the critic's bring nothing, so its credit is split evenly.
    weights = {"solver": 0.75, "critic": 0.25, "reviser": 0.0}
    of = path("solver", "critic", "solver", "critic", outcome=1.0)
    credit, asked = credited("reward_blame", of, additive(weights), prefixes=(0.0, 0.2, 0.2, 1.0))
    assert credit.rewards == pytest.approx((0.15, 0.125, 0.6, 0.125), abs=1e-12)
    assert [question for question in asked if isinstance(question, int)] == [0, 1, 2, 3]
    assert credit.values == (0.0, 0.2, 0.2, 1.0, 1.0) and credit.failure is None


def test_prefix_values_end_with_the_outcome_that_nobody_asks_for() -> None:
    asked: list[Question] = []

    def value(questions: Sequence[Question]) -> list[float]:
        asked.extend(questions)
        return [0.5] * len(questions)

    assert answered(prefix_values(path("solver", "critic", outcome=1.0)), value) == [0.5, 0.5, 1.0]
    assert asked == [0, 1]


UNIT = st.floats(0.0, 1.0)


@given(
    agents=st.lists(st.sampled_from(PLAYERS), min_size=1, max_size=5),
    game=st.lists(UNIT, min_size=8, max_size=8),
    prefixes=st.lists(UNIT, min_size=5, max_size=5),
    outcome=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_and_no_message_gets_more_than_the_whole(agents, game, prefixes, outcome) -> None:
    def worth(coalition: frozenset[str]) -> float:
        return game[sum(2**place for place, player in enumerate(PLAYERS) if player in coalition)]

    of = path(*agents, outcome=outcome)
    credit, _ = credited("reward_blame", of, worth, prefixes)
    whole = game[7] - game[0] if outcome else outcome - prefixes[0]
    assert math.fsum((*credit.rewards, credit.unplaced)) == pytest.approx(whole, abs=1e-9)
    assert all(abs(reward) <= 1 + 1e-9 for reward in credit.rewards)
    split, _ = credited("shapley", of, worth)
    assert math.fsum((*split.rewards, split.unplaced)) == pytest.approx(game[7] - game[0], abs=1e-9)
    for agent in set(agents):
        own = [reward for name, reward in zip(agents, split.rewards, strict=True) if name == agent]
        assert max(own) == min(own), "an agent's messages share evenly"


@given(agents=st.permutations(PLAYERS), game=st.lists(UNIT, min_size=8, max_size=8))
@settings(max_examples=50, deadline=None)
def test_credit_does_not_depend_on_names(agents, game) -> None:
    renamed = dict(zip(PLAYERS, agents, strict=True))

    def worth(coalition: frozenset[str]) -> float:
        return game[sum(2**place for place, player in enumerate(PLAYERS) if player in coalition)]

    def with_new_names(coalition: frozenset[str]) -> float:
        return worth(frozenset(old for old in PLAYERS if renamed[old] in coalition))

    before, _ = credited("shapley", path(*PLAYERS, outcome=1.0), worth)
    after, _ = credited("shapley", path(*agents, outcome=1.0, players=tuple(agents)), with_new_names)
    assert before.rewards == after.rewards
