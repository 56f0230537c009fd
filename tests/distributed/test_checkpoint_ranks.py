"""Runs of two real ranks that stop and go on: bit for bit on as many ranks, nearly on another number or strategy."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.phases.resuming import assert_same_run, assert_same_weights, traces, train

SCRIPT = str(Path(__file__).with_name("checkpoint_ranks.py"))
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
TOLERANCE = 1e-6
TIMEOUT_S = 500
"""Of twenty small runs, which take less than a minute on cores that nobody shares."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank."""
    runs = tmp_path_factory.mktemp("alone")
    train(runs, "sft")
    return runs / "sft"


def made(runs: Path, strategies: tuple[str, str]) -> Path:
    """Everything that checkpoint_ranks.py does, with one rank before and after it."""
    for strategy in strategies:
        train(runs, "sft", f"name=one_to_{strategy}", stop=("train", 2))
    ended = run_ranks("torchrun", 2, SCRIPT, str(runs), *strategies, timeout_s=TIMEOUT_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for strategy in strategies:
        assert "which 2 ranks wrote and 1 go on from" in train(runs, "sft", f"name={strategy}_to_one", resume=True)
    return runs


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("torch"), ("ddp", "fsdp2"))


@pytest.fixture(scope="module")
def of_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return made(tmp_path_factory.mktemp("deepspeed"), ("zero2", "zero3"))


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def runs(strategy: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("of_deepspeed" if strategy.startswith("zero") else "of_torch")


def test_as_many_ranks_go_on_bit_for_bit(strategy: str, runs: Path) -> None:
    assert_same_run(runs / "whole" / f"sft_{strategy}", runs / f"sft_{strategy}")


def test_ranks_that_sample_go_on_with_the_same_texts(strategy: str, runs: Path) -> None:
    """Who samples what is decided as they go, and the last bits of a log-probability by what is sampled beside it."""
    one, other = runs / "whole" / f"at_grpo_{strategy}", runs / f"at_grpo_{strategy}"
    texts = [[[turn["text"] for turn in trace["turns"]] for trace in traces(folder)] for folder in (one, other)]
    assert texts[0] and texts[0] == texts[1]
    assert_same_weights(one, other, tolerance=1e-5)


def test_another_number_of_ranks_goes_on_to_the_same_weights(strategy: str, runs: Path, alone: Path) -> None:
    for name in (f"one_to_{strategy}", f"{strategy}_to_one", f"whole/sft_{strategy}"):
        assert_same_weights(runs / name, alone, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", ["ddp_to_fsdp2", "fsdp2_to_ddp", "zero2_to_zero3", "zero3_to_zero2"])
def test_another_strategy_goes_on_to_the_same_weights(name: str, request: pytest.FixtureRequest, alone: Path) -> None:
    runs: Path = request.getfixturevalue("of_deepspeed" if "zero" in name else "of_torch")
    assert_same_weights(runs / name, alone, tolerance=TOLERANCE)
