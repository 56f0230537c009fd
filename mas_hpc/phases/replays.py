"""Credit of recorded paths by replays: many games advanced together, what was sampled kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from math import nan

from mas_hpc.credit_assignment.credit import CREDIT, Credit, CreditMethod, Path, Question
from mas_hpc.credit_assignment.shapley import Attribution, leave_one_out, mean_of_replays, shapley
from mas_hpc.data.value_store import Key, path_digest
from mas_hpc.orchestration.episode import Play, Result, Steps, parallel
from mas_hpc.orchestration.events import serve_all
from mas_hpc.orchestration.replay import Counterfactual, ValueFunction, shared, valued
from mas_hpc.rollout.engine import Completion, RolloutEngine
from mas_hpc.types import Task, Turn

Outcomes = MutableMapping[Key, float]


@dataclass(frozen=True, kw_only=True)
class Game:
    """One path whose messages get credit, and how the questions about it are answered."""

    task: Task
    path: Path
    how: Play
    value: ValueFunction
    num_replays: int

    outcomes: Callable[[str], Outcomes] = field(default_factory=lambda: defaultdict[str, dict](dict).__getitem__)
    """Where outcomes are looked up and kept, by subject."""

    @property
    def counterfactual(self) -> Counterfactual:
        """What answers the questions."""
        return Counterfactual(
            task=self.task, path=self.path.turns, how=self.how, value=self.value, num_replays=self.num_replays
        )  # fmt: skip

    def credit(self, method: CreditMethod) -> Steps[Credit | None]:
        """The credit of the path's messages; None where a value is missing because every replay of it failed.

        An attribution whose estimator sampled no coalitions has the standard errors of the mean over the replays: nan with
        fewer than two replays that have all outcomes.
        """
        counterfactual, canonical = self.counterfactual, cache(self.counterfactual.canonical)
        credit: Credit | None = yield from valued(
            CREDIT[method](self.path), lambda question: self._mean(counterfactual, question), canonical
        )
        if credit is None or credit.attribution is None or any(credit.attribution.standard_error):
            return credit
        single = (yield from self._single_replays(method, canonical)) if self.num_replays > 1 else []
        errors = mean_of_replays(single).standard_error if len(single) > 1 else (nan,) * len(self.path.players)
        return replace(credit, attribution=replace(credit.attribution, standard_error=errors))

    def _single_replays(self, method: CreditMethod, canonical: Callable[[Question], Question]) -> Steps[list[Attribution]]:
        """The attribution by each replay alone, of those with all outcomes; nothing is sampled."""
        outcomes = cache(lambda question: self.outcomes(self._subject(self.path.turns, question)))

        def known(question: Question, number: int) -> Steps[float]:
            yield from ()
            return outcomes(question).get((question, number), nan)

        def alone(number: int) -> Steps[Attribution | None]:
            players = self.path.players
            estimate = leave_one_out(players) if method == "loo" else shapley(players, seed=self.path.seed)
            return valued(estimate, lambda question: known(question, number), canonical)

        found = yield from parallel([alone(number) for number in range(self.num_replays)])
        return [attribution for attribution in found if attribution is not None]

    def siblings(self, place: int, count: int) -> Steps[list[tuple[Turn, float]]]:
        """Message `place` and `count` alternatives to it, each with the mean outcome from it on; nan if all replays failed."""
        counterfactual = self.counterfactual
        fresh = yield from counterfactual.alternatives(place, count)
        turns = [self.path.turns[place], *fresh]
        branches = [replace(counterfactual, path=(*self.path.turns[:place], turn)) for turn in turns]
        values = yield from parallel([self._mean(branch, place + 1) for branch in branches])
        return list(zip(turns, values, strict=True))

    def _mean(self, counterfactual: Counterfactual, question: Question) -> Steps[float]:
        return counterfactual.mean(question, self.outcomes(self._subject(counterfactual.path, question)))

    def _subject(self, path: tuple[Turn, ...], question: Question) -> str:
        """What an outcome belongs to: a coalition that plays anew to the question, a prefix to its turns, else to the path."""
        anew = isinstance(question, frozenset) and self.value in ("removal", "replacement")
        kind = "prefix" if isinstance(question, int) else self.value
        kept = () if anew else path[:question] if isinstance(question, int) else path
        sampling = self.how.sampling
        drawn = f"T {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, seed {self.how.seed}"
        return f"{self.task.id} | {kind} | {path_digest(kept) if kept else ''} | {drawn}"


def play_games(
    engine: RolloutEngine, games: Sequence[tuple[str, Steps[Result]]], *, max_live: int, requests: Counter[str],
    on_answers: Callable[[], None] = lambda: None,
) -> list[Result]:  # fmt: skip
    """The results of all games; those of one question (its id comes first) go on together and ask for equal completions once.

    At most `max_live` questions are under way. `requests` counts the completions that were asked for and those that were
    sampled, and their tokens. `on_answers` is called whenever a question's games have taken the outcomes of a batch.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, (task, _) in enumerate(games):
        numbers[task].append(number)

    def ask(served: Sequence[Completion]) -> None:
        requests["asked"] += len(served)

    def sample(served: Sequence[Completion]) -> None:
        on_answers()
        requests["sampled"] += len(served)
        requests["tokens"] += sum(len(completion.token_ids) for completion in served)

    trees = [shared(noted(parallel([games[number][1] for number in members]), ask), {}) for members in numbers.values()]
    found = serve_all(engine, [noted(tree, sample) for tree in trees], max_live=max_live)
    by_number = dict(zip(chain.from_iterable(numbers.values()), chain.from_iterable(found), strict=True))
    return [by_number[number] for number in range(len(games))]


def noted(steps: Steps[Result], note: Callable[[Sequence[Completion]], None]) -> Steps[Result]:
    """The same steps; `note` is shown the completions of every batch, after the steps have used them."""
    try:
        wanted = next(steps)
        while True:
            served = yield wanted
            try:
                wanted = steps.send(served)
            finally:  # the last batch ends the steps
                note(served)
    except StopIteration as end:
        return end.value
