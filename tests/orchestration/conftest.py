"""A team of four on the ring, spoken for by a script; its episodes and what is asked about them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import CompactTemplate
from mas_hpc.config import ModelConfig
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.replay import Counterfactual, ValueFunction
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import Behaviour, ScriptedEngine
from mas_hpc.types import Task, Trace, Turn

NAMES = ("solver", "critic", "reviser", "verifier")
EVERYBODY = frozenset(NAMES)
FAILED = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")


@pytest.fixture(scope="session")
def tokenizer():
    return load_model(ModelConfig(), seed=0)[1]


@pytest.fixture
def team(tokenizer) -> Team:
    agents = {name: Agent(name=name, role=ROLES[name], policy=name, sees="transcript", max_new_tokens=16) for name in NAMES}
    return Team(agents=agents, topology=Pipeline(agents=NAMES, num_looped=2, max_rounds=2), template=CompactTemplate(tokenizer))


@pytest.fixture
def task() -> Task:
    """x = 012 modulo 4: sums 1, 3, 2. The other solution is 230."""
    return Task(id="ring/132", question="modulo 4", answer="012", compact="132", grader="ring")


@pytest.fixture
def pipeline(team: Team) -> Team:
    """The four in a line, nobody twice."""
    return replace(team, topology=Pipeline(agents=NAMES))


def of(*names: str) -> frozenset[str]:
    return frozenset(names)


def coalitions(names: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(members) for size in range(len(names) + 1) for members in combinations(names, size)]


def drawn(request: Request) -> int:
    """A number that depends on all of a request, as a sampled completion does."""
    record = repr((request.prompt_ids, request.policy, request.seed)).encode()
    return int.from_bytes(hashlib.blake2b(record, digest_size=4).digest(), "big")


def chance(request: Request) -> str:
    """Agents named after what they give; answers are right in one of two requests."""
    given = ("===+", "!!!-") if request.policy in ("critic", "verifier") else ("012", "111")
    return given[drawn(request) % 2]


def play_of(team: Team, seed: int = 0) -> Play:
    return Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=seed)


def record(team: Team, task: Task, tokenizer, behaviour: Behaviour = chance, seed: int = 0) -> Trace:
    """One episode, as a run leaves it behind."""
    engine = ScriptedEngine(behaviour, tokenizer)
    return collect(engine, [task], play_of(team, seed), max_live=1, on_trace=lambda trace: None)[0]


def counterfactual(
    team: Team, task: Task, path: Sequence[Turn], value: ValueFunction, *, num_replays: int = 1, seed: int = 7
) -> Counterfactual:
    how = play_of(team, seed)
    return Counterfactual(task=task, path=tuple(path), how=how, value=value, num_replays=num_replays)


def asked(engine: ScriptedEngine) -> list[str]:
    """Whose messages were sampled, by policy."""
    return [request.policy for request in engine.requests]
