"""Requests to the engines that own their policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, RolloutStats, Weights


class RoutedEngine(RolloutEngine):
    """Policies with a model of their own are served by it, all others by `main`.

    All engines share one vocabulary: token ids of one agent are read by the others as they are.
    Example: RoutedEngine(engine, {"judge": larger}).generate(requests)
    """

    def __init__(self, main: RolloutEngine, own: Mapping[str, RolloutEngine]) -> None:
        self._engines = [main, *own.values()]
        self._owner = {policy: place for place, policy in enumerate(own, 1)}
        self._numbers: dict[tuple[int, int], int] = {}
        self._count = 0

    @property
    def stats(self) -> RolloutStats:
        """Totals over the engines."""
        return reduce(add, (engine.stats for engine in self._engines))

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """The trained weights are those of the main engine; the others never change."""
        return self._engines[0].load(version=version, weights=weights)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue each request with its owner."""
        places = [self._owner.get(request.policy, 0) for request in requests]
        first = self._count
        for place, engine in enumerate(self._engines):
            mine = [number for number, owner in enumerate(places) if owner == place]
            if mine:
                inner = engine.submit([requests[number] for number in mine])
                self._numbers |= {(place, own): first + number for own, number in zip(inner, mine, strict=True)}
        self._count += len(requests)
        return list(range(first, self._count))

    def poll(self) -> list[tuple[int, Completion]]:
        """Let every engine that has requests work."""
        busy = sorted({place for place, _ in self._numbers})
        ended = [(place, own, completion) for place in busy for own, completion in self._engines[place].poll()]
        return [(self._numbers.pop((place, own)), completion) for place, own, completion in ended]

    def cancel(self) -> None:
        """Forget what every engine has outstanding."""
        self._numbers.clear()
        for engine in self._engines:
            engine.cancel()
