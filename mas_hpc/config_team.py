"""The knobs of a team: who is in it, what they are asked for, and who speaks when. Imports no torch."""

from __future__ import annotations

import difflib
import re
from typing import Literal

from pydantic import model_validator

from mas_hpc.agents.role import ROLES, Produces, Sees
from mas_hpc.config_methods import Count, Positive, Section


class RoleConfig(Section):
    """A role of your own; it replaces a built-in one of the same name."""

    name: str
    """What agents call it in `role`."""
    produces: Produces
    """answer: may become the team's; verdict: accepts or rejects the latest answer; text: what others read, such as a plan."""
    prompt: str
    """Instruction in chat templates. Answers are read from \\boxed{}, verdicts from a line VERDICT: CORRECT or INCORRECT."""


class AgentConfig(Section):
    """One agent of the team."""

    name: str
    """Unique in the team."""
    role: str = "solver"
    """solver, critic, reviser, verifier, debater, judge, proposer, aggregator, or one of team.roles."""
    prompt: str = ""
    """Instruction in chat templates; empty: the role's own."""
    policy: str = ""
    """Weights that speak for it, shared by agents of one policy; empty: `shared`, or its own name with per_agent adapters."""
    sees: Literal["auto"] | Sees = "auto"
    """All earlier turns (transcript), none (question), those that give answers, the latest answer, or the round before as
    numbered references. auto: references for proposers and aggregators; question and latest in best_of_n; else transcript."""
    max_new_tokens: Count = 0
    """Completion limit of this agent in tokens; 0: rollout.max_new_tokens."""


class TeamConfig(Section):
    """Who speaks, and when."""

    topology: Literal["pipeline", "single", "debate", "mixture", "self_consistency", "best_of_n"] = "pipeline"
    """pipeline: in order; debate: all each round, a last agent of role judge closes, else the majority; mixture: layers of
    proposers, the last agent aggregates; self_consistency: the first alone, `rounds` times, the majority; best_of_n: the first
    tries until the second accepts; single: the first once."""
    agents: tuple[AgentConfig, ...] = (
        AgentConfig(name="solver", role="solver"),
        AgentConfig(name="critic", role="critic"),
        AgentConfig(name="reviser", role="reviser"),
        AgentConfig(name="verifier", role="verifier"),
    )
    """The team, in speaking order."""
    roles: tuple[RoleConfig, ...] = ()
    """Roles of your own."""
    models: dict[str, str] = {}  # noqa: RUF012 (pydantic copies it)
    """Policies served by a model of their own, and its path; of the same vocabulary, and never trained."""
    rounds: Positive = 1
    """Rounds of a debate, layers of a mixture, samples, tries, or times that the looped part of a pipeline may speak."""
    loop_from: str = ""
    """pipeline: while the last agent rejects, this one and those after go again; empty: the reviser before a last verifier."""
    stop_when_accepted: bool = False
    """pipeline: end the episode as soon as any verdict accepts the answer; otherwise every agent speaks."""

    @property
    def speaking(self) -> tuple[AgentConfig, ...]:
        """The agents that the topology lets speak."""
        return self.agents[:1] if self.topology in ("single", "self_consistency") else self.agents

    @property
    def looped(self) -> int:
        """How many of the last agents of a pipeline, or tries of best_of_n, go again."""
        if self.topology == "best_of_n":
            return 2
        names = [agent.name for agent in self.agents]
        if self.loop_from:
            return len(names) - names.index(self.loop_from)
        return 2 if [agent.role for agent in self.agents[-2:]] == ["reviser", "verifier"] else 0

    @property
    def max_speakers(self) -> int:
        """Most turns of an episode."""
        if self.topology in ("pipeline", "best_of_n"):
            return len(self.agents) + self.looped * (self.rounds - 1)
        return (len(self.speaking) - self.has_closing) * self.rounds + self.has_closing

    @property
    def closes_with_judge(self) -> bool:
        """Whether a debate's last agent decides instead of the majority."""
        return self.topology == "debate" and self.agents[-1].role == "judge"

    @property
    def has_closing(self) -> bool:
        """Whether the last agent speaks once, after the rounds of the others."""
        return self.topology == "mixture" or self.closes_with_judge

    def produces(self, agent: AgentConfig) -> Produces:
        """What the agent's role gives."""
        own = {role.name: role.produces for role in self.roles}
        return own.get(agent.role) or ROLES[agent.role].produces

    @model_validator(mode="after")
    def _safe_names(self) -> TeamConfig:
        policies = {agent.policy for agent in self.agents} - {""} | set(self.models)
        for name in (*(agent.name for agent in self.agents), *sorted(policies)):
            if name and not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"agents: {name!r} names files and metrics; expected letters, digits, _, - and . after the first"
                )
        return self

    @model_validator(mode="after")
    def _names(self) -> TeamConfig:
        names = [agent.name for agent in self.agents]
        if not names or len(set(names)) < len(names) or "" in names:
            raise ValueError(f"agents: names {names}; expected at least one agent and unique names")
        if "base" in (*names, *(agent.policy for agent in self.agents), *self.models):
            raise ValueError("agents: 'base' is the policy of the model without adapters; choose another name")
        known = [role.name for role in self.roles]
        if len(set(known)) < len(known):
            raise ValueError(f"roles: names {known}; expected unique names")
        for agent in self.agents:
            if agent.role not in (every := {*ROLES, *known}):
                near = difflib.get_close_matches(agent.role, every, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {sorted(every)}, or add it to team.roles"
                raise ValueError(f"agents: {agent.name} has role {agent.role!r}; {hint}")
        unused = sorted(set(self.models) - {agent.policy for agent in self.agents})
        if unused:
            raise ValueError(f"models: no agent has policy {unused}; set policy of an agent, or leave them out")
        return self

    @model_validator(mode="after")
    def _form(self) -> TeamConfig:
        roles = [agent.role for agent in self.agents]
        if self.topology == "best_of_n" and [self.produces(agent) for agent in self.agents] != ["answer", "verdict"]:
            raise ValueError(f"topology=best_of_n: roles {roles}; expected two agents, one that answers and one that judges")
        if not any(self.produces(agent) == "answer" for agent in self.speaking[: len(self.speaking) - self.has_closing]):
            beside = " beside the last one" if self.has_closing else ""
            raise ValueError(f"topology={self.topology}: roles {roles}; expected an agent whose role gives an answer{beside}")
        if self.loop_from and (self.topology != "pipeline" or self.loop_from not in [agent.name for agent in self.agents]):
            raise ValueError(f"loop_from={self.loop_from!r}: expected the name of an agent of a pipeline")
        if self.loop_from and self.rounds == 1:
            raise ValueError(f"loop_from={self.loop_from!r}: with rounds=1 nobody goes again; set rounds to 2 or more")
        if self.topology == "pipeline" and self.looped and self.rounds > 1 and self.produces(self.agents[-1]) != "verdict":
            raise ValueError(
                f"loop_from={self.loop_from!r}: the last agent sends back by verdict, but its role {roles[-1]!r} gives none; "
                "end with a role that does, or leave loop_from out"
            )
        if self.rounds > 1 and (self.topology == "single" or (self.topology == "pipeline" and not self.looped)):
            raise ValueError(
                f"rounds={self.rounds}: only a pipeline that ends in a reviser and a verifier, or names loop_from, goes again; "
                f"team.topology is {self.topology}, the last roles are {roles[-2:]}"
            )
        if self.stop_when_accepted and self.topology not in ("pipeline", "single"):
            raise ValueError(f"stop_when_accepted=true: only a pipeline stops early, not {self.topology}; set it to false")
        return self
