"""Many generators on one engine: each goes on as soon as its own requests are answered, or all together in waves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol

from mas_hpc.orchestration.episode import Result, Steps
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine

Schedule = Literal["events", "waves"]
IDLE_S = 0.002
"""Pause after a poll in which the engine neither ended a request nor ran the model: it waits for another rank."""


class Jobs(Protocol):
    """Which jobs are done here, as distributed.tickets hands them out."""

    def take(self, live: int, room: int) -> list[int]:
        """Jobs to start: none, or at most `room`, given that `live` are under way here."""
        ...

    def finish(self, job: int, result: Any) -> bool:
        """Hand in a result; whether it is the one that counts."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether every job is finished, here or elsewhere."""
        ...


class InOrder(Jobs):
    """Jobs that are all done here, started in their order."""

    def __init__(self, jobs: Sequence[int]) -> None:
        self._jobs, self._taken = jobs, 0
        self._results: dict[int, Any] = {}

    def take(self, live: int, room: int) -> list[int]:
        """The next `room` jobs."""
        first, self._taken = self._taken, min(self._taken + room, len(self._jobs))
        return list(self._jobs[first : self._taken])

    def finish(self, job: int, result: Any) -> bool:
        """Every result counts."""
        self._results[job] = result
        return True

    @property
    def exhausted(self) -> bool:
        """Whether all were handed in."""
        return len(self._results) == len(self._jobs)

    def results(self) -> dict[int, Any]:
        """What was handed in, by job."""
        return self._results


def drive(
    engine: RolloutEngine, jobs: Jobs, begin: Callable[[int], Steps[Result]], end: Callable[[int, Result], object], *,
    max_live: int, schedule: Schedule = "events",
) -> None:  # fmt: skip
    """Do jobs, at most `max_live` at a time, until all are finished; `begin` gives a job's generator, `end` gets its result.

    `end` hands the result in with jobs.finish. The engine works while there is nothing to do here too, because it may serve
    other ranks. What is still under way when all jobs are finished was done elsewhere, and is dropped.
    """
    live: _Live[Result] = _Live(engine, in_waves=schedule == "waves")
    try:
        while not jobs.exhausted:
            room = max_live - len(live)
            for job in jobs.take(len(live), room) if room and live.takes_more else ():
                live.start(job, begin(job))
            for job, result in live.poll():
                end(job, result)
    except BaseException:
        engine.cancel()
        raise
    if len(live):
        engine.cancel()


def serve_all(
    engine: RolloutEngine, games: Sequence[Steps[Result]], *, max_live: int | None = None, schedule: Schedule = "events"
) -> list[Result]:
    """The results of all generators, in order; at most `max_live` are under way at a time."""
    jobs = InOrder(range(len(games)))
    drive(engine, jobs, games.__getitem__, jobs.finish, max_live=max_live or len(games), schedule=schedule)
    return [jobs.results()[number] for number in range(len(games))]


def run(engine: RolloutEngine, steps: Steps[Result]) -> Result:
    """Serve one generator's requests until it returns."""
    return serve_all(engine, [steps])[0]


@dataclass(slots=True, kw_only=True)
class _Asked(Generic[Result]):
    """A generator that waits for its requests; completions by their place among them."""

    steps: Steps[Result]
    requests: list[Request]
    served: dict[int, Completion] = field(default_factory=dict)


class _Live(Generic[Result]):
    """The generators that are under way, by job."""

    def __init__(self, engine: RolloutEngine, *, in_waves: bool) -> None:
        self._engine, self._in_waves = engine, in_waves
        self._asked: dict[int, _Asked[Result]] = {}
        self._unsent: list[int] = []
        self._outstanding: dict[int, tuple[int, int]] = {}
        """Job and place of each request, by its number in the engine."""
        self._ended: list[tuple[int, Result]] = []

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def takes_more(self) -> bool:
        """Waves are filled up between them, events at any time."""
        return not (self._in_waves and self._outstanding)

    def start(self, job: int, steps: Steps[Result]) -> None:
        """Run the generator up to its first requests."""
        self._advance(job, steps, None)

    def poll(self) -> list[tuple[int, Result]]:
        """Send requests, let the engine work, go on with every generator that is answered; jobs that ended, with results."""
        self._send()
        self._receive()
        answered = [(job, asked) for job, asked in self._asked.items() if len(asked.served) == len(asked.requests)]
        for job, asked in answered if self.takes_more else ():
            self._advance(job, asked.steps, [asked.served[place] for place in range(len(asked.requests))])
        ended, self._ended = self._ended, []
        return ended

    def _advance(self, job: int, steps: Steps[Result], completions: list[Completion] | None) -> None:
        try:
            requests = next(steps) if completions is None else steps.send(completions)
        except StopIteration as end:
            self._asked.pop(job, None)
            self._ended.append((job, end.value))
        else:
            self._asked[job] = _Asked(steps=steps, requests=requests)
            self._unsent.append(job)

    def _send(self) -> None:
        """One submission for all generators that went on."""
        places = [(job, place) for job in self._unsent for place in range(len(self._asked[job].requests))]
        if places:
            numbers = self._engine.submit([self._asked[job].requests[place] for job, place in places])
            self._outstanding.update(zip(numbers, places, strict=True))
        self._unsent.clear()

    def _receive(self) -> None:
        steps = self._engine.stats.steps
        completions = self._engine.poll()
        for number, completion in completions:
            job, place = self._outstanding.pop(number)
            self._asked[job].served[place] = completion
        if not completions and self._engine.stats.steps == steps and not self._ended:
            time.sleep(IDLE_S)
