"""A team of four on the ring, spoken for by a script."""

from __future__ import annotations

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import CompactTemplate
from mas_hpc.config import ModelConfig
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.types import Task

NAMES = ("solver", "critic", "reviser", "verifier")


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
