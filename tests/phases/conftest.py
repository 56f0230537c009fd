"""Finished runs of a tiny team, opened again; and episodes of a scripted team."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import CompactTemplate
from mas_hpc.cli import app
from mas_hpc.config import ModelConfig
from mas_hpc.credit_assignment.credit import Path as CreditPath
from mas_hpc.distributed.world import World
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.replay import ValueFunction
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.phases.replays import Game
from mas_hpc.rollout.engine import Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.run import Run, reopen
from mas_hpc.types import Task, Trace

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
NUM_TASKS = 8
SMALL = (
    "model.hidden_size=32", "model.num_heads=2", "data.num_digits=3", "data.num_train=12", f"data.num_test={NUM_TASKS}",
    f"rollout.num_tasks={NUM_TASKS}", "warm_start.steps=2", "warm_start.batch_size=4", "team.stop_when_accepted=false",
)  # fmt: skip


def rollout(runs: Path, name: str, *words: str) -> Path:
    """The folder of a rollout by the command line."""
    app(["rollout", QUICKSTART, *SMALL, *words, f"runs_dir={runs}", f"name={name}"], standalone_mode=False)
    return runs / name


def opened(folder: Path, world: World | None = None) -> Run:
    """As a command reopens it, without a word."""
    return reopen(folder, world or World(), Console(quiet=True))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rollouts are made."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def finished(runs: Path) -> Path:
    """A rollout of the tiny model; nobody writes to it."""
    return rollout(runs, "finished")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to write to."""
    return shutil.copytree(finished, tmp_path / "run")


NAMES = ("solver", "critic", "reviser", "verifier")
TASKS = [Task(id=name, question="modulo 4", answer="012", compact="132", grader="ring") for name in "pqrs"]


def chance(request: Request) -> str:
    """Right or wrong, accepted or not, by all of the request."""
    record = repr((request.prompt_ids, request.policy, request.seed)).encode()
    given = ("===+", "!!!-") if request.policy in ("critic", "verifier") else ("012", "111")
    return given[hashlib.blake2b(record, digest_size=1).digest()[0] % 2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(ModelConfig(), seed=0)[1]


@pytest.fixture(scope="module")
def how(tokenizer) -> Play:
    agents = {name: Agent(name=name, role=ROLES[name], policy=name, sees="transcript", max_new_tokens=16) for name in NAMES}
    team = Team(agents=agents, topology=Pipeline(agents=NAMES), template=CompactTemplate(tokenizer))
    return Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=0)


@pytest.fixture(scope="module")
def traces(how: Play, tokenizer) -> list[Trace]:
    """Two episodes of each question."""
    sampling = replace(how.sampling, episodes=2)
    engine = ScriptedEngine(chance, tokenizer)
    found = collect(engine, TASKS, replace(how, sampling=sampling), max_live=8, on_trace=lambda trace: None)
    assert {trace.reward for trace in found} == {0.0, 1.0}
    return found


def game(trace: Trace, how: Play, value: ValueFunction = "removal", num_replays: int = 2) -> Game:
    path = CreditPath(turns=trace.path, players=tuple(how.team.agents), outcome=float(trace.reward or 0.0))
    return Game(task=trace.task, path=path, how=how, value=value, num_replays=num_replays)
