"""Standard errors of credit over replays, from outcomes that are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from mas_hpc.credit_assignment.credit import CreditMethod
from mas_hpc.orchestration.episode import Play
from mas_hpc.orchestration.events import run as serve
from mas_hpc.phases.replays import Game
from mas_hpc.rollout.scripted import ScriptedEngine
from tests.phases.conftest import NAMES, chance, game

SOLVER, BOTH = frozenset({"solver"}), frozenset({"solver", "critic"})


def told(one: Game, replays: Sequence[Callable[[frozenset[str]], float]]) -> Game:
    """The game with every outcome known: a function of the coalition for each replay."""
    known = {
        (frozenset(members), number): play(frozenset(members))
        for number, play in enumerate(replays) for size in range(5) for members in combinations(NAMES, size)
    }  # fmt: skip
    return replace(one, num_replays=len(replays), outcomes=lambda subject: dict(known))


def alone(coalition: frozenset[str]) -> float:
    return float(coalition >= SOLVER)


def together_only(coalition: frozenset[str]) -> float:
    return float(coalition >= BOTH)


def failing_alone(coalition: frozenset[str]) -> float:
    return 0.0 if coalition else math.nan


# By replay, solver and critic earn (1, 0) and (1/2, 1/2) as Shapley values, (1, 0) and (1, 1) as leave-one-out. The mean of two
# numbers a and b has the standard error |a - b| / 2.
@pytest.mark.parametrize(
    ("method", "expected"), [("shapley", (0.25, 0.25, 0.0, 0.0)), ("loo", (0.0, 0.5, 0.0, 0.0))]
)  # fmt: skip
@pytest.mark.parametrize("replays", [(alone, together_only), (alone, failing_alone, together_only)])
def test_an_exact_attribution_has_the_standard_error_over_its_complete_replays(
    how: Play, traces, tokenizer, method: CreditMethod, expected, replays
) -> None:
    engine = ScriptedEngine(chance, tokenizer)
    credit = serve(engine, told(game(traces[0], how, "replacement"), replays).credit(method))
    assert credit is not None and credit.attribution is not None and engine.requests == []
    assert credit.attribution.standard_error == pytest.approx(expected, abs=1e-12)


def test_the_mean_over_replays_is_the_attribution_itself(how: Play, traces, tokenizer) -> None:
    one = told(game(traces[0], how, "replacement"), (alone, together_only, together_only))
    credit = serve(ScriptedEngine(chance, tokenizer), one.credit("shapley"))
    assert credit is not None and credit.attribution is not None
    assert credit.attribution.phi == pytest.approx((2 / 3, 1 / 3, 0.0, 0.0))
    # stdev(1, 1/2, 1/2) / sqrt(3) = sqrt(1/12) / sqrt(3)
    assert credit.attribution.standard_error == pytest.approx((1 / 6, 1 / 6, 0.0, 0.0))


@pytest.mark.parametrize("replays", [(alone,), (alone, failing_alone)])
def test_fewer_than_two_complete_replays_say_nothing_of_the_error(how: Play, traces, tokenizer, replays) -> None:
    one = told(game(traces[0], how, "replacement"), replays)
    credit = serve(ScriptedEngine(chance, tokenizer), one.credit("shapley"))
    assert credit is not None and credit.attribution is not None
    assert all(map(math.isnan, credit.attribution.standard_error)) and len(credit.attribution.standard_error) == 4


def test_the_error_over_replays_is_of_coalitions_that_play_the_same(how: Play, traces, tokenizer) -> None:
    engine = ScriptedEngine(chance, tokenizer)
    for value in ("removal", "masked", "resample"):
        one = game(traces[0], how, value, num_replays=8)
        credit = serve(engine, one.credit("shapley"))
        assert credit is not None and credit.attribution is not None
        assert all(0 <= error < 0.5 for error in credit.attribution.standard_error)
        assert max(credit.attribution.standard_error) > 0
