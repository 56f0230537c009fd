"""Shapley values against closed forms, the axioms, the package shapiq and their own intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pytest
import shapiq
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.credit_assignment.estimate import Estimate, answered
from mas_hpc.credit_assignment.shapley import (
    Attribution,
    Coalition,
    antithetic,
    exact,
    kernel_shap,
    leave_one_out,
    mean_of_replays,
    shapley,
)
from mas_hpc.errors import ConfigError, DataError

Game = Callable[[Coalition], float]
Estimator = Callable[[Sequence[str]], Estimate[Coalition, Attribution]]


def names_of(num_players: int) -> list[str]:
    return [f"p{number}" for number in range(num_players)]


def subsets_of(players: Sequence[str]) -> list[Coalition]:
    return [frozenset(subset) for size in range(len(players) + 1) for subset in combinations(players, size)]


def play(estimate: Estimate[Coalition, Attribution], game: Game) -> tuple[Attribution, list[list[Coalition]]]:
    """The attribution, and the batches that were asked."""
    batches: list[list[Coalition]] = []

    def value(coalitions: Sequence[Coalition]) -> list[float]:
        batches.append(list(coalitions))
        return [game(coalition) for coalition in coalitions]

    return answered(estimate, value), batches


def random_game(players: Sequence[str], seed: int) -> Game:
    """Independent values of all coalitions: nothing but the names' positions and the seed decides."""
    random = Random(seed)
    return {subset: random.uniform(-1, 1) for subset in subsets_of(players)}.__getitem__


def interactions(num_players: int, seed: int, sizes: Sequence[int]) -> tuple[Game, list[float]]:
    """A sum of random bonuses for sets of players, and its Shapley values: every member of a set gets an equal part."""
    random, players = Random(seed), names_of(num_players)
    bonuses = [(frozenset(random.sample(players, size)), random.gauss(0, 1)) for size in sizes for _ in range(2 * num_players)]
    phi = [math.fsum(bonus / len(team) for team, bonus in bonuses if player in team) for player in players]
    return lambda coalition: 2.0 + math.fsum(bonus for team, bonus in bonuses if team <= coalition), phi


ALL_SIZES = (1, 2, 3, 4, 5)
SHAPLEY_ESTIMATORS: dict[str, Estimator] = {
    "exact": exact,
    "antithetic": lambda players: antithetic(players, seed=3, tolerance=-1.0, max_pairs=3, pairs_per_batch=2),
    "kernel_shap": lambda players: kernel_shap(players, budget=2 * len(players) + 12, seed=3),
}
ESTIMATORS = {**SHAPLEY_ESTIMATORS, "leave_one_out": leave_one_out}


def each(coalition: Coalition, **weights: float) -> list[float]:
    return [weights[player] for player in coalition]


CLOSED_FORMS: dict[str, tuple[str, Game, list[float]]] = {
    "glove: one left, two right": ("lrs", lambda team: float("l" in team and len(team) > 1), [2 / 3, 1 / 6, 1 / 6]),
    # Littlechild and Owen 1973: each stretch of runway is shared by those who need it
    "airport": ("abc", lambda team: max([0, *each(team, a=1, b=2, c=4)]), [1 / 3, 5 / 6, 17 / 6]),
    # a is pivotal after one or two others, half of the time; b, c and d after 1 of 3 players and 1 of 3 pairs: (1/3 + 1/3) / 4
    "voting [4; 3, 2, 1, 1]": (
        "abcd",
        lambda team: float(sum(each(team, a=3, b=2, c=1, d=1)) >= 4),
        [1 / 2, 1 / 6, 1 / 6, 1 / 6],
    ),
    "unanimity of b and d": ("abcd", lambda team: float(team >= {"b", "d"}), [0.0, 0.5, 0.0, 0.5]),
    "additive over an empty 7": ("abc", lambda team: 7 + sum(each(team, a=1.5, b=-2, c=0.25)), [1.5, -2, 0.25]),
    "redundant twins": ("ab", lambda team: float(bool(team)), [0.5, 0.5]),
    "alone": ("a", lambda team: 3.0 if team else 1.0, [2.0]),
}


@pytest.mark.parametrize(("players", "game", "phi"), CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_exact_values_of_games_with_a_closed_form(players: str, game: Game, phi: list[float]) -> None:
    attribution, batches = play(exact(players), game)
    assert attribution.phi == pytest.approx(phi, abs=1e-12, rel=0)
    assert (attribution.players, attribution.standard_error) == (tuple(players), (0.0,) * len(players))
    assert (attribution.empty, attribution.full) == (game(frozenset()), game(frozenset(players)))
    assert [len(batch) for batch in batches] == [2 ** len(players)] == [attribution.num_coalitions]


@pytest.mark.parametrize(("players", "game", "phi"), CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_sampling_estimators_are_exact_once_everything_was_asked(players: str, game: Game, phi: list[float]) -> None:
    everything = 2 ** len(players)
    for estimate in (
        antithetic(players, seed=0, tolerance=-1.0, max_pairs=1000),
        kernel_shap(players, budget=everything, seed=0),
        kernel_shap(players, budget=10 * everything, seed=0),
        shapley(players, seed=0),
    ):
        attribution, batches = play(estimate, game)
        assert attribution.phi == pytest.approx(phi, abs=1e-9, rel=0)
        assert attribution.standard_error == (0.0,) * len(players)
        assert attribution.num_coalitions == everything == len({c for batch in batches for c in batch})


@pytest.mark.parametrize("num_players", [3, 4, 5, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_and_full_budget_values_agree_with_shapiq(num_players: int, seed: int) -> None:
    players = names_of(num_players)
    game = random_game(players, seed)

    def matrix_game(member_CN: np.ndarray) -> np.ndarray:
        return np.array(
            [game(frozenset(p for p, is_member in zip(players, row, strict=True) if is_member)) for row in member_CN]
        )

    theirs = shapiq.ExactComputer(matrix_game, num_players)(index="SV", order=1)
    expected = [theirs[(number,)] for number in range(num_players)]
    assert play(exact(players), game)[0].phi == pytest.approx(expected, abs=1e-9, rel=0)
    assert play(kernel_shap(players, budget=2**num_players, seed=0), game)[0].phi == pytest.approx(expected, abs=1e-9, rel=0)


small_games = st.integers(1, 5).flatmap(
    lambda num_players: st.lists(st.floats(-100, 100), min_size=2**num_players, max_size=2**num_players)
)


def game_of(values: list[float]) -> tuple[list[str], dict[Coalition, float]]:
    players = names_of(len(values).bit_length() - 1)
    return players, dict(zip(subsets_of(players), values, strict=True))


@pytest.mark.parametrize("name", SHAPLEY_ESTIMATORS)
@given(values=small_games)
def test_efficiency_the_parts_sum_to_full_minus_empty(name: str, values: list[float]) -> None:
    players, game = game_of(values)
    attribution, _ = play(SHAPLEY_ESTIMATORS[name](players), game.__getitem__)
    assert sum(attribution.phi) == pytest.approx(game[frozenset(players)] - game[frozenset()], abs=1e-9)
    assert abs(attribution.gap) <= 1e-9 * max(1.0, abs(attribution.full - attribution.empty))


@given(values=small_games)
def test_symmetry_players_who_add_the_same_to_everybody_get_the_same(values: list[float]) -> None:
    players, game = game_of(values)
    twin = [*players, "twin"]  # of players[0]: only how many of the two take part counts

    def value(coalition: Coalition) -> float:
        count = len(coalition & {players[0], "twin"})
        others = coalition - {players[0], "twin"}
        return 0.5 * count * count * game[others | {players[0]}] + game[others]

    phi = play(exact(twin), value)[0].phi
    assert phi[0] == phi[-1]


@pytest.mark.parametrize("name", ["exact", "antithetic", "leave_one_out"])
@given(values=small_games)
def test_null_player_gets_exactly_nothing(name: str, values: list[float]) -> None:
    players, game = game_of(values)
    attribution, _ = play(ESTIMATORS[name]([*players, "null"]), lambda coalition: game[coalition - {"null"}])
    assert attribution.phi[-1] == 0.0


@pytest.mark.parametrize("name", ESTIMATORS)
@given(pair=st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(st.floats(-9, 9), min_size=2**n, max_size=2**n)] * 2)))
def test_additivity_the_value_of_a_sum_of_games_is_the_sum_of_values(name: str, pair: tuple[list[float], list[float]]) -> None:
    (players, first), (_, second) = map(game_of, pair)
    estimator = ESTIMATORS[name]
    both = play(estimator(players), lambda c: 2 * first[c] + second[c])[0].phi
    one, other = (play(estimator(players), game.__getitem__)[0].phi for game in (first, second))
    assert both == pytest.approx([2 * a + b for a, b in zip(one, other, strict=True)], abs=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_names_do_not_matter(name: str) -> None:
    players, other_names = names_of(7), ["solver", "critic", "z", "a", "reviser", "", "judge"]
    game, renamed = random_game(players, seed=5), random_game(other_names, seed=5)
    ours, _ = play(ESTIMATORS[name](players), game)
    theirs, _ = play(ESTIMATORS[name](other_names), renamed)
    assert replace(ours, players=theirs.players) == theirs


def test_the_order_of_the_players_does_not_change_the_last_digit_of_exact_values() -> None:
    players = names_of(6)
    game = random_game(players, seed=2)
    assert play(exact(players), game)[0].phi == play(exact(players[::-1]), game)[0].phi[::-1]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("num_players", [1, 2, 3, 7])
def test_no_coalition_is_asked_twice(name: str, num_players: int) -> None:
    players = names_of(num_players)
    attribution, batches = play(ESTIMATORS[name](players), random_game(players, seed=1))
    asked = [coalition for batch in batches for coalition in batch]
    assert len(asked) == len(set(asked)) == attribution.num_coalitions
    assert all(batches)
    assert {frozenset(), frozenset(players)} <= set(asked)


def test_antithetic_stops_early_when_the_standard_errors_are_small() -> None:
    players = names_of(8)
    game, phi = interactions(8, seed=0, sizes=(1, 2))
    early, batches = play(antithetic(players, seed=0, tolerance=1e-6, max_pairs=20, pairs_per_batch=1), game)
    late, _ = play(antithetic(players, seed=0, tolerance=-1.0, max_pairs=20, pairs_per_batch=1), game)
    assert len(batches) == 2  # two pairs are the least that have a spread
    assert early.num_coalitions < late.num_coalitions / 2
    assert early.phi == pytest.approx(phi, abs=1e-9)
    assert max(early.standard_error) <= 1e-6


def test_antithetic_goes_on_until_every_standard_error_is_within_the_tolerance() -> None:
    players, (game, _) = names_of(8), interactions(8, seed=4, sizes=ALL_SIZES)

    def largest_error(max_pairs: int, tolerance: float) -> float:
        estimate = antithetic(players, seed=1, tolerance=tolerance, max_pairs=max_pairs, pairs_per_batch=1)
        return max(play(estimate, game)[0].standard_error)

    errors = [largest_error(max_pairs, 0.0) for max_pairs in range(2, 40)]
    first_within = next(error for error in errors if error <= 0.6)
    assert first_within != errors[0]
    assert largest_error(40, tolerance=0.6) == first_within


def test_batches_change_how_antithetic_asks_but_not_what_it_finds() -> None:
    players, (game, _) = names_of(8), interactions(8, seed=1, sizes=ALL_SIZES)
    runs = [
        play(antithetic(players, seed=2, tolerance=0.0, max_pairs=11, pairs_per_batch=size), game) for size in (1, 4, None, 99)
    ]
    assert [len(batches) for _, batches in runs] == [11, 3, 2, 1]
    assert len({(attribution.phi, attribution.standard_error) for attribution, _ in runs}) == 1


def test_every_player_is_first_and_last_once_in_a_cycle() -> None:
    players = names_of(7)
    _, batches = play(antithetic(players, seed=8, tolerance=0.0, max_pairs=7), random_game(players, seed=0))
    asked = {coalition for batch in batches for coalition in batch}
    assert {frozenset({player}) for player in players} | {frozenset(players) - {player} for player in players} <= asked


def test_kernel_shap_spends_its_budget_on_small_sizes_with_complements_and_on_pairs() -> None:
    players = names_of(12)
    everybody = frozenset(players)
    attribution, batches = play(kernel_shap(players, budget=501, seed=0), lambda coalition: float(len(coalition)))
    asked = set(batches[0])
    assert len(batches) == 1
    assert attribution.num_coalitions == 500  # pairs: the odd one is left over
    assert asked == {everybody - coalition for coalition in asked}
    sizes = [sum(len(coalition) == size for coalition in asked) for size in range(13)]
    assert sizes[:3] == [1, 12, 66]
    assert all(0 < asked_of < math.comb(12, size) for size, asked_of in enumerate(sizes) if 2 < size < 10)


def test_kernel_shap_draws_sizes_by_the_kernel_and_keeps_budget_for_those_in_between() -> None:
    # shares of 1 / (k (20 - k)) for k = 2..18: sizes 2 and 18 have 2/36 of 0.2495 (harmonic numbers), 22 percent
    batches = [play(kernel_shap(names_of(20), budget=100, seed=seed), lambda _: 0.0)[1][0] for seed in range(40)]
    drawn = [len(coalition) for batch in batches for coalition in batch if 1 < len(coalition) < 19]
    assert sum(size in (2, 18) for size in drawn) / len(drawn) == pytest.approx(0.2227, abs=0.03)
    (batch,) = play(kernel_shap(names_of(17), budget=1700, seed=0), lambda _: 0.0)[1]
    assert sum(3 < len(coalition) < 14 for coalition in batch) > 500  # sizes 1 to 3 and 14 to 16 alone would cost 1666


def test_kernel_shap_refuses_a_budget_that_leaves_the_regression_singular() -> None:
    with pytest.raises(ConfigError, match="budget=17: KernelSHAP of 8 players needs at least 18 coalitions; raise it"):
        answered(kernel_shap(names_of(8), budget=17, seed=0), lambda coalitions: [0.0] * len(coalitions))
    attribution, _ = play(kernel_shap(names_of(8), budget=18, seed=0), lambda coalition: float(len(coalition)))
    assert attribution.phi == pytest.approx([1.0] * 8)
    assert all(map(math.isnan, attribution.standard_error))  # nothing was drawn between sizes 1 and 7


@pytest.mark.parametrize("seed", range(4))
def test_one_antithetic_pair_and_a_few_of_kernel_shap_are_exact_for_interactions_of_two(seed: int) -> None:
    game, phi = interactions(10, seed, sizes=(1, 2))
    orders, _ = play(antithetic(names_of(10), seed=seed, tolerance=0.0, max_pairs=1), game)
    kernel, _ = play(kernel_shap(names_of(10), budget=60, seed=seed), game)
    assert orders.phi == pytest.approx(phi, abs=1e-12)
    assert kernel.phi == pytest.approx(phi, abs=1e-9)
    assert all(map(math.isnan, orders.standard_error))  # one pair says nothing about its error
    assert kernel.standard_error == pytest.approx([0.0] * 10, abs=1e-9)


def test_one_antithetic_pair_is_not_exact_for_interactions_of_three() -> None:
    game, phi = interactions(7, seed=0, sizes=(3,))
    attribution, _ = play(antithetic(names_of(7), seed=0, tolerance=0.0, max_pairs=1), game)
    assert np.abs(np.subtract(attribution.phi, phi)).max() > 0.1


SAMPLERS: dict[str, Callable[[int], Estimate[Coalition, Attribution]]] = {
    "antithetic": lambda seed: antithetic(names_of(8), seed=seed, tolerance=0.0, max_pairs=16),
    "kernel_shap": lambda seed: kernel_shap(names_of(8), budget=200, seed=seed),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampled_values_lie_within_their_own_99_percent_interval(name: str) -> None:
    misses, standardised = 0, []
    for seed in range(30):
        game, phi = interactions(8, seed, sizes=ALL_SIZES)
        attribution, _ = play(SAMPLERS[name](seed), game)
        scores = np.subtract(attribution.phi, phi) / np.array(attribution.standard_error)
        misses += int((np.abs(scores) > 2.576).sum())
        standardised.extend(scores)
    assert misses <= 0.03 * 30 * 8
    assert 0.7 < np.std(standardised) < 1.2  # and the interval is not merely wide
    assert abs(np.mean(standardised)) < 0.2


def test_antithetic_is_unbiased_even_with_one_pair() -> None:
    game, phi = interactions(5, seed=3, sizes=(3, 4))
    runs = [play(antithetic(names_of(5), seed=seed, tolerance=0.0, max_pairs=1), game)[0].phi for seed in range(1500)]
    error = np.std(runs, axis=0, ddof=1) / math.sqrt(len(runs))
    assert (np.abs(np.mean(runs, axis=0) - phi) < 3.5 * error).all()


def test_kernel_shap_beats_orders_at_equal_cost_and_both_beat_leave_one_out() -> None:
    errors: dict[str, list[float]] = {name: [] for name in [*SAMPLERS, "leave_one_out"]}
    for seed in range(20):
        game, phi = interactions(8, seed, sizes=ALL_SIZES)
        orders, _ = play(SAMPLERS["antithetic"](seed), game)
        kernel, _ = play(kernel_shap(names_of(8), budget=orders.num_coalitions, seed=seed), game)
        for name, one in zip(errors, (orders, kernel, play(leave_one_out(names_of(8)), game)[0]), strict=True):
            errors[name].append(float(np.square(np.subtract(one.phi, phi)).mean()))
    rmse = {name: math.sqrt(np.mean(squares)) for name, squares in errors.items()}
    assert rmse["kernel_shap"] < 0.85 * rmse["antithetic"]
    assert rmse["antithetic"] < 0.2 * rmse["leave_one_out"]


def test_leave_one_out_says_what_it_does_not_explain() -> None:
    needed, batches = play(leave_one_out("ab"), lambda coalition: float(len(coalition) == 2))
    assert (needed.phi, needed.gap, needed.conserving, needed.num_coalitions) == ((1.0, 1.0), -1.0, False, 4)
    assert (mean_of_replays([needed, needed]).conserving, mean_of_replays([needed, needed]).gap) == (False, -1.0)
    twins, _ = play(leave_one_out("abc"), lambda coalition: float(bool(coalition)))
    assert (twins.phi, twins.gap, twins.num_coalitions) == ((0.0, 0.0, 0.0), 1.0, 5)
    assert len(batches) == 1


def test_the_estimator_follows_from_the_number_of_players() -> None:
    def asked(num_players: int, **limits: int) -> list[int]:
        estimate = shapley(names_of(num_players), seed=0, **limits)
        return [len(batch) for batch in play(estimate, lambda coalition: math.sqrt(len(coalition)))[1]]

    assert asked(6) == [64]
    assert 2 + 7 + 7 < asked(7)[0] < 2**7  # a cycle of seven pairs
    assert asked(7) == asked(7, max_antithetic=7)
    assert asked(17, budget=300) == [300]
    assert asked(7, max_exact=7) == [128]
    assert asked(7, max_antithetic=6, budget=40) == [40]


def test_mean_of_replays_measures_the_noise_of_the_values() -> None:
    def replay(phi: tuple[float, float], full: float) -> Attribution:
        return Attribution(players=("a", "b"), phi=phi, standard_error=(0.0, 0.0), empty=0.0, full=full, num_coalitions=4)

    mean = mean_of_replays([replay((1.0, 0.0), 1.0), replay((0.0, 0.0), 0.0), replay((0.5, 0.5), 1.0)])
    assert mean.phi == pytest.approx((0.5, 1 / 6))
    assert mean.standard_error == pytest.approx((0.5 / math.sqrt(3), math.sqrt(1 / 12) / math.sqrt(3)))
    assert (mean.empty, mean.full, mean.num_coalitions) == (0.0, pytest.approx(2 / 3), 12)
    assert all(map(math.isnan, mean_of_replays([replay((1.0, 0.0), 1.0)]).standard_error))


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("failed", "bad"), [("critic, solver", math.nan), ("nobody", math.inf), ("solver, verifier", -math.inf)]
)
def test_a_value_that_is_not_finite_names_its_coalition(name: str, failed: str, bad: float) -> None:
    def game(coalition: Coalition) -> float:
        return bad if (", ".join(sorted(coalition)) or "nobody") == failed else 1.0

    with pytest.raises(DataError, match=rf"coalition \({failed}\) is {bad}: expected a finite number; decide what"):
        play(ESTIMATORS[name](["verifier", "solver", "critic"]), game)


def test_an_attribution_that_does_not_conserve_is_our_mistake() -> None:
    parts = {"players": ("a",), "standard_error": (0.0,), "empty": 0.25, "full": 1.0, "num_coalitions": 2}
    assert Attribution(phi=(0.75,), **parts).gap == 0.0
    with pytest.raises(AssertionError):
        Attribution(phi=(1.0,), **parts)  # v(nobody) was forgotten
    assert Attribution(phi=(1.0,), conserving=False, **parts).gap == -0.25


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_players_of_one_name_are_our_mistake(name: str) -> None:
    with pytest.raises(AssertionError, match="distinct names"):
        play(ESTIMATORS[name](["a", "b", "a"]), len)
