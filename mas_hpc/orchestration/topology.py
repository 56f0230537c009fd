"""Topologies: pure values that say who speaks next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mas_hpc.types import Turn


class Topology(Protocol):
    """Who speaks next, given the committed turns."""

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """Names of the agents that speak from this state; empty ends the episode."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One agent speaks once.

    Example: Single(agent="solver").next_speakers([]) == ("solver",)
    """

    agent: str

    def next_speakers(self, path: Sequence[Turn]) -> tuple[str, ...]:
        """The agent, then nobody."""
        return () if path else (self.agent,)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The agents speak in order; while the last one rejects, the last `num_looped` agents go again.

    Example: Pipeline(agents=("solver", "critic", "reviser", "verifier"), num_looped=2, max_rounds=2)
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
