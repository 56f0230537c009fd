"""From the configuration of a team to the team: agents, topology, the dialect of the model, and the models that serve it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import LETTERS, ROLES, Role, Sees
from mas_hpc.agents.template import ChatTemplate, CompactTemplate, Template
from mas_hpc.config import RunConfig
from mas_hpc.config_team import AgentConfig, TeamConfig
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.topology import Debate, MixtureOfAgents, Pipeline, Single, Topology
from mas_hpc.rollout.placement import ServedModel, turns_by_agent
from mas_hpc.types import BASE_POLICY


def build_team(settings: TeamConfig, config: RunConfig, tokenizer: Any) -> Team:
    """Every agent that speaks, its role and policy; a chat template if the tokenizer has one."""
    template: Template = ChatTemplate(tokenizer) if tokenizer.chat_template else CompactTemplate(tokenizer)
    own = {
        role.name: Role(
            name=role.name, produces=role.produces, letter=LETTERS[role.produces], prompt=role.prompt,
            sees=ROLES[role.name].sees if role.name in ROLES else "transcript",
        )
        for role in settings.roles
    }  # fmt: skip
    roles = ROLES | own
    agents = {
        agent.name: Agent(
            name=agent.name, role=roles[agent.role], prompt=agent.prompt,
            sees=_sees(settings, number, agent, roles[agent.role]),
            policy=policy_of(agent, config),
            max_new_tokens=agent.max_new_tokens or config.rollout.max_new_tokens,
        )
        for number, agent in enumerate(settings.speaking)
    }  # fmt: skip
    return Team(agents=agents, topology=build_topology(settings), template=template)


def policy_of(agent: AgentConfig, config: RunConfig) -> str:
    """The weights that speak for an agent."""
    return agent.policy or (agent.name if config.adapters.policies == "per_agent" else "shared")


def served_models(config: RunConfig, count: Callable[[str, str], int]) -> tuple[ServedModel, ...]:
    """The full models behind the team, the one that is trained first, unless every agent has a model of its own.

    `count` gives the parameters of the model under a key of the configuration, at a path.
    """
    turns: Counter[str] = Counter()
    for agent in config.team.speaking:
        turns[policy_of(agent, config)] += turns_by_agent(config.team)[agent.name]
    own, path = config.team.models, config.model.path
    shared = tuple(policy for policy in turns if policy not in own)
    models = [
        ServedModel(name=its, policies=(policy,), num_parameters=count(f"team.models.{policy}", its), turns=turns[policy])
        for policy, its in own.items()
    ]
    if shared:
        spoken = sum(turns[policy] for policy in shared)
        policies = (*shared, BASE_POLICY)
        models.insert(0, ServedModel(name=path, policies=policies, num_parameters=count("model.path", path), turns=spoken))
    return tuple(models)


def _sees(settings: TeamConfig, number: int, agent: AgentConfig, role: Role) -> Sees:
    if agent.sees != "auto":
        return agent.sees
    if settings.topology == "best_of_n":
        return ("question", "latest")[number]  # type: ignore[return-value]
    return role.sees


def build_topology(settings: TeamConfig) -> Topology:
    """The form of the team."""
    names = tuple(agent.name for agent in settings.speaking)
    if settings.topology in ("single", "self_consistency"):  # rounds of single are 1
        return Single(agent=names[0], samples=settings.rounds)
    if settings.topology == "mixture":
        return MixtureOfAgents(proposers=names[:-1], aggregator=names[-1], layers=settings.rounds)
    if settings.topology == "debate":
        judged = settings.closes_with_judge
        return Debate(debaters=names[:-1] if judged else names, judge=names[-1] if judged else "", rounds=settings.rounds)
    return Pipeline(
        agents=names, stop_when_accepted=settings.stop_when_accepted, num_looped=settings.looped, max_rounds=settings.rounds
    )
