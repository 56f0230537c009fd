"""Topologies: pure values that say who speaks next, and which answer is the team's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mas_hpc.answers import majority
from mas_hpc.types import Turn, rounds_of

Names = frozenset[str]


class Topology(Protocol):
    """Who speaks next, given the committed turns."""

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """Names of the agents that speak from this state; empty ends the episode."""
        ...

    def answer(self, given: Sequence[Turn]) -> str | None:
        """The team's answer, of the turns whose role gives one; None when there is none that can be read."""
        ...

    @property
    def votes(self) -> bool:
        """Whether the team's answer is a vote, and not that of one turn."""
        ...

    def restricted(self, present: Names, answering: Names) -> Topology:
        """The same form with the agents in `present` alone: the others are skipped, as if they passed on what they read.

        `answering` are the agents whose role gives an answer; turns that cannot change the answer any more are left out.
        """
        ...


def last_answer(given: Sequence[Turn]) -> str | None:
    """The latest answer, though it may be unreadable."""
    return given[-1].answer if given else None


def vote(given: Sequence[Turn]) -> str | None:
    """Majority of the answers of the last round; the first seen among equals."""
    return majority(turn.answer for turn in rounds_of(given)[-1]) if given else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One agent answers from the question, once or several times; of several the majority counts (arXiv 2203.11171).

    Example: Single(agent="solver", samples=3).next_speakers([]) == ("solver", "solver", "solver")
    """

    agent: str
    samples: int = 1

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """All samples at once, then nobody."""
        return () if path else (self.agent,) * self.samples

    def answer(self, given: Sequence[Turn]) -> str | None:
        """The majority's, or the only one."""
        return vote(given)

    @property
    def votes(self) -> bool:
        """With several samples."""
        return self.samples > 1

    def restricted(self, present: Names, answering: Names) -> Topology:
        """Itself, or nobody."""
        return self if self.agent in present else Pipeline(agents=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Another topology that ends as soon as `judge` has spoken.

    Example: Judged(topology=pipeline, judge="critic").next_speakers([solver, critic]) == ()
    """

    topology: Topology
    judge: str

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """As the topology, until the judge has spoken."""
        return () if path and path[-1].agent == self.judge else self.topology.next_speakers(path)

    def answer(self, given: Sequence[Turn]) -> str | None:
        """As the topology."""
        return self.topology.answer(given)

    @property
    def votes(self) -> bool:
        """As the topology."""
        return self.topology.votes

    def restricted(self, present: Names, answering: Names) -> Topology:
        """The restricted topology, ended by the same judge."""
        return replace(self, topology=self.topology.restricted(present, answering))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The agents speak in order; while the last one rejects, the last `num_looped` agents go again.

    Best-of-n is the pipeline of a solver that sees only the question and a verifier that sees only the latest answer, both
    looped. Example: Pipeline(agents=("solver", "critic", "reviser", "verifier"), num_looped=2, max_rounds=2)
    """

    agents: tuple[str, ...]
    stop_when_accepted: bool = False
    """End as soon as any verdict accepts."""
    num_looped: int = 0
    max_rounds: int = 1
    """How often the looped agents may speak in all."""

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """The next agent in order; after the last, the loop's first unless the last verdict accepts."""
        if self.stop_when_accepted and path and path[-1].verdict is True:
            return ()
        if len(path) < len(self.agents):
            return (self.agents[len(path)],)
        if not self.num_looped:
            return ()
        rounds, within = divmod(len(path) - len(self.agents), self.num_looped)
        if within == 0 and (path[-1].verdict is True or rounds + 1 >= self.max_rounds):
            return ()
        return (self.agents[len(self.agents) - self.num_looped + within],)

    def answer(self, given: Sequence[Turn]) -> str | None:
        """The latest."""
        return last_answer(given)

    @property
    def votes(self) -> bool:
        """No."""
        return False

    def restricted(self, present: Names, answering: Names) -> Topology:
        """The present agents in order. Without the agent that sends back, or an answer to send back, nothing is looped."""
        agents = [name for name in self.agents if name in present]
        looped = [name for name in self.agents[len(self.agents) - self.num_looped :] if name in present]
        loops = self.agents[-1:] == tuple(looped[-1:]) and self.max_rounds > 1 and not answering.isdisjoint(looped)
        while agents and not loops and agents[-1] not in answering:
            agents.pop()
        return replace(self, agents=tuple(agents), num_looped=len(looped) if loops else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Debate:
    """Every debater speaks once a round and reads the rounds before (arXiv 2305.14325); a judge may close it.

    One debater alone is the multi-turn single agent: it answers again, `rounds` times, reading its own answers.
    Example: Debate(debaters=("a", "b"), judge="judge", rounds=2) gives (a, b), (a, b), (judge,)
    """

    debaters: tuple[str, ...]
    rounds: int
    judge: str = ""
    """Who decides after the last round; empty: the majority of the last round."""

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """All debaters until the rounds are over, then the judge."""
        if len(path) < self.rounds * len(self.debaters):
            return self.debaters
        return (self.judge,) if self.judge and len(path) == self.rounds * len(self.debaters) else ()

    def answer(self, given: Sequence[Turn]) -> str | None:
        """The judge's, or else the majority of the last round."""
        return vote(given)

    @property
    def votes(self) -> bool:
        """Unless a judge decides."""
        return not self.judge

    def restricted(self, present: Names, answering: Names) -> Topology:
        """The present debaters; without the judge the majority decides."""
        debaters = tuple(name for name in self.debaters if name in present)
        return replace(self, debaters=debaters, judge=self.judge if self.judge in present else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfAgents:
    """Layers of proposers, each of which reads the layer before as numbered references, then an aggregator (arXiv 2406.04692).

    Example: MixtureOfAgents(proposers=("a", "b"), aggregator="c", layers=2) gives (a, b), (a, b), (c,)
    """

    proposers: tuple[str, ...]
    aggregator: str
    layers: int

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """All proposers of a layer, then the aggregator."""
        return self._as_debate.next_speakers(path)

    def answer(self, given: Sequence[Turn]) -> str | None:
        """The aggregator's; without one the majority of the last layer."""
        return vote(given)

    @property
    def votes(self) -> bool:
        """No."""
        return False

    def restricted(self, present: Names, answering: Names) -> Topology:
        """The present proposers; without the aggregator the majority of the last layer decides."""
        return self._as_debate.restricted(present, answering)

    @property
    def _as_debate(self) -> Debate:
        """The same order of speakers: what differs is what each of them reads."""
        return Debate(debaters=self.proposers, judge=self.aggregator, rounds=self.layers)
