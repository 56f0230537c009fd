"""An agent: a name, a role, the policy that speaks for it and what it sees of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mas_hpc.agents.role import Role, Sees
from mas_hpc.types import Turn, rounds_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One member of a team.

    Example: Agent(name="critic", role=ROLES["critic"], policy="shared", sees="transcript", max_new_tokens=8)
    """

    name: str
    role: Role
    policy: str
    sees: Sees
    max_new_tokens: int
    prompt: str = ""
    """Instruction that replaces the role's own; empty: the role's."""

    @property
    def instruction(self) -> str:
        """What the agent is told in chat templates."""
        return self.prompt or self.role.prompt

    def view(self, path: Sequence[Turn], agents: Mapping[str, Agent]) -> tuple[Turn, ...]:
        """The committed turns that this agent reads, in order."""
        if self.sees == "question":
            return ()
        if self.sees == "references":
            return rounds_of(path)[-1] if path else ()
        if self.sees in ("answers", "latest"):
            answers = tuple(turn for turn in path if agents[turn.agent].role.produces == "answer")
            return answers[-1:] if self.sees == "latest" else answers
        return tuple(path)
