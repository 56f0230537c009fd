"""Shapley values of a team: who earned what part of v(everybody) - v(nobody).

A game is a function v from coalitions to numbers of order 1 (success rates, rewards). Every estimator is a generator that asks
for the values of coalitions in batches, never twice for one (see estimate.py). Results depend on the order of the players
and the seed, not on names. A standard error speaks of sampled permutations or coalitions with the values taken as they were
answered; the noise of the values themselves is measured by `mean_of_replays`.

n players, N the coalition of all, Z in a name: a row a coalition; P: a row a pair.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise
from random import Random
from statistics import fmean
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mas_hpc.credit_assignment.estimate import Estimate
from mas_hpc.errors import ConfigError, DataError

Coalition: TypeAlias = frozenset[str]
Values: TypeAlias = Mapping[Coalition, float]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What each player contributed to full - empty; asserts that the parts sum to the whole when `conserving`.

    Example: two players who only succeed together: Attribution(players=("solver", "critic"), phi=(0.5, 0.5),
        standard_error=(0.0, 0.0), empty=0.0, full=1.0, num_coalitions=4).gap == 0.0
    """

    players: tuple[str, ...]
    phi: tuple[float, ...]
    """One a player, in the unit of the values."""
    standard_error: tuple[float, ...]
    """One a player: 0 where nothing was sampled, nan where too little was sampled to tell."""
    empty: float
    """Value of nobody."""
    full: float
    """Value of everybody."""
    num_coalitions: int
    """Values asked for: the distinct coalitions of a game, summed over replays."""
    conserving: bool = True
    """Whether phi sums to full - empty by definition, as Shapley values do and leave-one-out does not."""

    def __post_init__(self) -> None:
        assert len(self.players) == len(self.phi) == len(self.standard_error)
        assert not self.conserving or abs(self.gap) <= 1e-9 * max(1.0, abs(self.full - self.empty)), (self.gap, self)

    @property
    def gap(self) -> float:
        """What phi leaves unexplained: full - empty - sum(phi)."""
        return math.fsum((self.full, -self.empty, *(-part for part in self.phi)))


def exact(players: Sequence[str]) -> Estimate[Coalition, Attribution]:
    """Shapley values (Shapley 1953) from all 2^n coalitions, asked in one batch.

    phi_i is the mean, over the sizes 0..n-1, of the mean marginal contribution of i to coalitions of that size.
    """
    names = _distinct(players)
    values: dict[Coalition, float] = {}
    yield from _ask((frozenset(members) for size in range(len(names) + 1) for members in combinations(names, size)), values)
    return _attribution(names, _shapley_values(names, values), np.zeros(len(names)), values)


def antithetic(
    players: Sequence[str], *, seed: int, tolerance: float, max_pairs: int, pairs_per_batch: int | None = None
) -> Estimate[Coalition, Attribution]:
    """Shapley values from random orders and their reverses (antithetic: Mitchell et al. 2022, JMLR 23:43, section 4.1).

    The mean over pairs of the marginal contributions along an order and its reverse: unbiased at any fixed number of pairs,
    exact after one pair for games whose interactions have at most two members, efficient because each order telescopes.
    In each cycle of n pairs every player comes first once, as in R's kernelshap::permshap.

    Stops after the batch at which at least 2 pairs were drawn and every standard error is <= tolerance, or after max_pairs.
    A batch of few pairs may stop too early, since pairs that agree by chance have no spread; pairs_per_batch None is a
    whole cycle. The standard error is the deviation over pairs / sqrt(pairs), nan for one pair, and with few pairs it is
    itself uncertain: of 8 pairs of 8 players, 95% intervals covered 84% of 150 seeds. Once all 2^n coalitions are known the
    result is that of `exact`.
    """
    names = _distinct(players)
    assert max_pairs >= 1 and (pairs_per_batch is None or pairs_per_batch >= 1)
    orders = islice(_balanced_orders(names, Random(seed)), max_pairs)
    values: dict[Coalition, float] = {}
    pairs: list[list[float]] = []
    while batch := list(islice(orders, pairs_per_batch or len(names))):
        yield from _ask((prefix for order in batch for prefix in (*_prefixes(order), *_prefixes(order[::-1]))), values)
        if len(values) == 2 ** len(names):
            return _attribution(names, _shapley_values(names, values), np.zeros(len(names)), values)
        pairs.extend(_pair_values(names, order, values) for order in batch)
        error = _standard_error(pairs)
        if (error <= tolerance).all():
            break
    return _attribution(names, np.mean(pairs, axis=0), error, values)


def kernel_shap(players: Sequence[str], *, budget: int, seed: int) -> Estimate[Coalition, Attribution]:
    """Shapley values by least squares weighted with the Shapley kernel (Lundberg & Lee 2017), constrained to efficiency.

    Asks one batch of at most `budget` coalitions, nobody and everybody among them: the small sizes and their complements
    completely, while the budget lasts (see `_enumerated_size`); of the sizes in between, pairs of a coalition and its
    complement, drawn with replacement by the kernel (Covert & Lee 2021, section 4.2). Exact when the budget covers all 2^n
    coalitions, and for games whose interactions have at most two members; else consistent, but biased while draws are few.

    The standard error is linearised from the draws, nan for fewer than two. Raises ConfigError when the budget does not
    cover the single players and their complements, without which the regression may be singular.
    """
    names = _distinct(players)
    least = min(2 * len(names) + 2, 2 ** len(names))
    if budget < least:
        raise ConfigError(f"budget={budget}: KernelSHAP of {len(names)} players needs at least {least} coalitions; raise it")
    complete, draws = _design(names, budget, Random(seed))
    everybody = frozenset(names)
    values: dict[Coalition, float] = {}
    yield from _ask((frozenset(), everybody, *complete, *draws, *(everybody - drawn for drawn in draws)), values)
    phi, error = _constrained_regression(names, complete, draws, values)
    return _attribution(names, phi, error, values)


def leave_one_out(players: Sequence[str]) -> Estimate[Coalition, Attribution]:
    """What is lost without each player, v(N) - v(N minus i): n + 2 coalitions, asked in one batch.

    Not a Shapley value and not conserving: biased by synergy. Two players who need each other both get the whole (gap < 0),
    two who can stand in for each other both get nothing (gap > 0).
    """
    names = _distinct(players)
    everybody = frozenset(names)
    values: dict[Coalition, float] = {}
    yield from _ask((frozenset(), everybody, *(everybody - {name} for name in names)), values)
    phi = [values[everybody] - values[everybody - {name}] for name in names]
    return _attribution(names, phi, np.zeros(len(names)), values, conserving=False)


def shapley(
    players: Sequence[str], *, seed: int, max_exact: int = 6, max_antithetic: int = 16, tolerance: float = 0.01,
    max_pairs: int = 100, budget: int = 2048,
) -> Estimate[Coalition, Attribution]:  # fmt: skip
    """Shapley values by the estimator that suits the number of players.

    Up to max_exact, all 2^n coalitions: with 6 players, 6 pairs of orders ask 41 of the 64 and still miss phi by a quarter of
    its spread (random games with interactions of 1 to 5 players), and no sampling error is left to explain. Up to
    max_antithetic, orders until the standard errors are <= tolerance, or max_pairs: unbiased, and stops by itself. Above,
    KernelSHAP within the budget: a cycle of n pairs alone costs about 2 n (n - 1) values there. At equal cost KernelSHAP had
    0.7 times the error of the orders with 8 to 20 players, and the same with noisy values; its budget is fixed beforehand.
    """
    if len(players) <= max_exact:
        return exact(players)
    if len(players) <= max_antithetic:
        return antithetic(players, seed=seed, tolerance=tolerance, max_pairs=max_pairs)
    return kernel_shap(players, budget=budget, seed=seed)


def mean_of_replays(attributions: Sequence[Attribution]) -> Attribution:
    """The same game, estimated from m independent replays of its values: mean phi, standard error = deviation / sqrt(m).

    The standard error is nan for one replay. It holds the noise of the values, and the sampling of coalitions only when the
    replays had different seeds.
    """
    players, conserving = attributions[0].players, attributions[0].conserving
    assert all((one.players, one.conserving) == (players, conserving) for one in attributions)
    return Attribution(
        players=players,
        phi=tuple(map(fmean, zip(*(one.phi for one in attributions), strict=True))),
        standard_error=tuple(_standard_error([one.phi for one in attributions]).tolist()),
        empty=fmean(one.empty for one in attributions),
        full=fmean(one.full for one in attributions),
        num_coalitions=sum(one.num_coalitions for one in attributions),
        conserving=conserving,
    )


def _balanced_orders(players: Sequence[str], random: Random) -> Iterator[tuple[str, ...]]:
    """Random orders without end, each uniform by itself; every player is first once in each cycle of n."""
    while True:
        for first in random.sample(players, len(players)):
            others = [player for player in players if player != first]
            yield first, *random.sample(others, len(others))


def _distinct(players: Sequence[str]) -> tuple[str, ...]:
    assert players and len(set(players)) == len(players), f"players {players}: expected distinct names"
    return tuple(players)


def _ask(coalitions: Iterable[Coalition], values: dict[Coalition, float]) -> Estimate[Coalition, None]:
    """Add the values that are not known, each coalition asked once; raises DataError for a value that is not finite."""
    unknown = [coalition for coalition in dict.fromkeys(coalitions) if coalition not in values]
    if not unknown:
        return
    answers = yield unknown
    for coalition, value in zip(unknown, answers, strict=True):
        if not math.isfinite(value):
            members = ", ".join(sorted(coalition)) or "nobody"
            raise DataError(
                f"value of the coalition ({members}) is {value}: expected a finite number; decide what a failed replay or a "
                "coalition without an answer is worth (for example 0.0), or leave the question out"
            )
        values[coalition] = value


def _attribution(
    players: tuple[str, ...], phi: Iterable[float], standard_error: Iterable[float], values: Values, *, conserving: bool = True
) -> Attribution:
    return Attribution(
        players=players, phi=tuple(map(float, phi)), standard_error=tuple(map(float, standard_error)),
        empty=values[frozenset()], full=values[frozenset(players)], num_coalitions=len(values), conserving=conserving,
    )  # fmt: skip


def _shapley_values(players: Sequence[str], values: Values) -> list[float]:
    """From the values of all coalitions; the sums are correctly rounded (fmean is over math.fsum), so their order is free."""
    phi = []
    for player in players:
        marginals: list[list[float]] = [[] for _ in players]
        for coalition, value in values.items():
            if player not in coalition:
                marginals[len(coalition)].append(values[coalition | {player}] - value)
        phi.append(fmean(map(fmean, marginals)))
    return phi


def _prefixes(order: Sequence[str]) -> list[Coalition]:
    return [frozenset(order[:size]) for size in range(len(order) + 1)]


def _pair_values(players: Sequence[str], order: Sequence[str], values: Values) -> list[float]:
    """Each player's mean marginal contribution along an order and along its reverse."""
    marginals: dict[str, list[float]] = {player: [] for player in players}
    for path in (order, order[::-1]):
        for player, (before, after) in zip(path, pairwise(_prefixes(path)), strict=True):
            marginals[player].append(values[after] - values[before])
    return [fmean(marginals[player]) for player in players]


def _standard_error(estimates: Sequence[Sequence[float]]) -> Floats:
    """Of the mean of independent estimates (a row each); nan for a single one."""
    return _error_of_draws(np.array(estimates), np.ones(len(estimates)))


def _mass(num_players: int, sizes: Iterable[int]) -> float:
    """The kernel's weight of all coalitions of these sizes: sum of 1 / (k (n - k)), up to a constant (Lundberg & Lee 2017)."""
    return sum(1.0 / (size * (num_players - size)) for size in sizes)


def _enumerated_size(num_players: int, budget: int) -> int:
    """Largest k such that all coalitions of the sizes up to k and from n - k are asked for: 1, and further from the outside in.

    A size and its complement come next when their share of the budget that is left, by the kernel, pays for all of them (as in
    the package shap). Enumerating for as long as the budget lasts would leave no draws to the sizes in between, which carry
    much weight: with 17 players and 1700 coalitions the error was five times as large.
    """
    size, left = 0, budget - 2
    while size < num_players // 2:
        outer, remaining = {size + 1, num_players - size - 1}, range(size + 1, num_players - size)
        cost = sum(math.comb(num_players, k) for k in outer)
        if size and cost > left * _mass(num_players, outer) / _mass(num_players, remaining):
            break
        size, left = size + 1, left - cost
    return size


def _design(players: Sequence[str], budget: int, random: Random) -> tuple[dict[Coalition, float], Counter[Coalition]]:
    """Weights of the enumerated coalitions, and draws of the others, counted under the member of the pair with players[0]."""
    num_players, everybody = len(players), frozenset(players)
    size = _enumerated_size(num_players, budget)
    complete = {
        frozenset(members): _mass(num_players, [k]) / math.comb(num_players, k)
        for k in range(1, num_players)
        if min(k, num_players - k) <= size
        for members in combinations(players, k)
    }
    draws: Counter[Coalition] = Counter()
    between = range(size + 1, num_players - size)
    masses = [_mass(num_players, [k]) for k in between]
    while between and len(draws) < (budget - 2 - len(complete)) // 2:
        (drawn,) = random.choices(between, masses)
        coalition = frozenset(random.sample(players, drawn))
        draws[coalition if players[0] in coalition else everybody - coalition] += 1
    return complete, draws


def _constrained_regression(
    players: Sequence[str], complete: Mapping[Coalition, float], draws: Counter[Coalition], values: Values
) -> tuple[Floats, Floats]:
    """phi and its standard error: least squares of v - v(empty) on membership, weighted, with sum(phi) = full - empty.

    The inverse of the bordered normal equations gives phi; its upper left block carries deviations of the sums over the
    draws to phi. The draws share the kernel's weight of the sizes that were not enumerated.
    """
    num_players, empty = len(players), values[frozenset()]
    rest = _mass(num_players, range(1, num_players)) - sum(complete.values())
    count_P = np.array(list(draws.values()), dtype=np.float64)
    rows = [*complete, *draws, *(frozenset(players) - coalition for coalition in draws)]
    weight_Z = np.concatenate([list(complete.values()), *[count_P * rest / max(1, 2 * draws.total())] * 2])
    member_ZN = np.array([[player in row for player in players] for row in rows], dtype=np.float64).reshape(-1, num_players)
    gain_Z = np.array([values[row] - empty for row in rows])
    bordered = np.ones((num_players + 1, num_players + 1))
    bordered[:-1, :-1], bordered[-1, -1] = member_ZN.T @ (weight_Z[:, None] * member_ZN), 0.0
    inverse = np.linalg.inv(bordered)
    phi_N = inverse[:-1] @ [*(member_ZN.T @ (weight_Z * gain_Z)), values[frozenset(players)] - empty]
    if len(complete) == 2**num_players - 2:
        return phi_N, np.zeros(num_players)
    score_ZN = member_ZN * (gain_Z - member_ZN @ phi_N)[:, None]
    first_PN, second_PN = np.split(score_ZN[len(complete) :], 2)
    return phi_N, _error_of_draws(rest * (first_PN + second_PN) / 2 @ inverse[:-1, :-1], count_P)


def _error_of_draws(draw_PN: Floats, count_P: Floats) -> Floats:
    """Standard error of the mean of independent draws, each row drawn `count_P` times; nan for fewer than two draws."""
    num_draws = count_P.sum()
    if num_draws < 2:
        return np.full(draw_PN.shape[1], math.nan)
    deviation_PN = draw_PN - count_P @ draw_PN / num_draws
    return np.sqrt(count_P @ deviation_PN**2 / (num_draws - 1) / num_draws)
