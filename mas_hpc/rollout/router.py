"""Requests to the engines that own their policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mas_hpc.rollout.engine import Completion, Request, RolloutEngine


class RoutedEngine:
    """Policies with a model of their own are served by it, all others by `main`; implements RolloutEngine.

    All engines share one vocabulary: token ids of one agent are read by the others as they are.
    Example: RoutedEngine(engine, {"judge": larger}).generate(requests)
    """

    def __init__(self, main: RolloutEngine, own: Mapping[str, RolloutEngine]) -> None:
        self._main = main
        self._own = own

    def load(self, *, version: int) -> None:
        """The trained weights are those of the main engine; the others never change."""
        self._main.load(version=version)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion a request, in order."""
        served: dict[int, Completion] = {}
        for name in [None, *self._own]:
            engine = self._main if name is None else self._own[name]
            numbers = [number for number, request in enumerate(requests) if self._owner(request) == name]
            if numbers:
                served |= zip(numbers, engine.generate([requests[number] for number in numbers]), strict=True)
        return [served[number] for number in range(len(requests))]

    def _owner(self, request: Request) -> str | None:
        return request.policy if request.policy in self._own else None
