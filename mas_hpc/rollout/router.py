"""Requests to the engines that own their policies, in this process. See sharded.py for those of other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, RolloutStats, Weights

_MAIN = ""


class RoutedEngine(RolloutEngine):
    """Policies with a model of their own are served by it, all others by `main`; None where this process does not have it.

    All engines share one vocabulary: token ids of one agent are read by the others as they are.
    Example: RoutedEngine(engine, {"judge": larger}).generate(requests)
    """

    def __init__(self, main: RolloutEngine | None, own: Mapping[str, RolloutEngine]) -> None:
        self._engines: dict[str, RolloutEngine] = ({_MAIN: main} if main is not None else {}) | dict(own)
        self._numbers: dict[tuple[str, int], int] = {}
        self._count = 0

    @property
    def stats(self) -> RolloutStats:
        """Totals over the engines."""
        return reduce(add, (engine.stats for engine in self._engines.values()))

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """The trained weights are those of the main engine; the others never change."""
        return self._engines[_MAIN].load(version=version, weights=weights) if _MAIN in self._engines else ""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue each request with its owner."""
        owners = [request.policy if request.policy in self._engines else _MAIN for request in requests]
        assert self._engines.keys() >= set(owners), "a policy without an engine"
        first = self._count
        for owner, engine in self._engines.items():
            mine = [place for place, name in enumerate(owners) if name == owner]
            if mine:
                inner = engine.submit([requests[place] for place in mine])
                self._numbers |= {(owner, own): first + place for own, place in zip(inner, mine, strict=True)}
        self._count += len(requests)
        return list(range(first, self._count))

    def poll(self) -> list[tuple[int, Completion]]:
        """Let every engine that has requests work."""
        busy = sorted({owner for owner, _ in self._numbers})
        ended = [(owner, own, completion) for owner in busy for own, completion in self._engines[owner].poll()]
        return [(self._numbers.pop((owner, own)), completion) for owner, own, completion in ended]

    def sleep(self) -> None:
        """All engines give back their memory."""
        for engine in self._engines.values():
            engine.sleep()

    def cancel(self) -> None:
        """Forget what every engine has outstanding."""
        self._numbers.clear()
        for engine in self._engines.values():
            engine.cancel()
