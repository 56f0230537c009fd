"""A team with a model of its own for one agent: two real ranks, each with one of the models, write what one process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mas_hpc.config import ModelConfig, RunConfig
from mas_hpc.config_file import load_config
from mas_hpc.data import trace_store
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.loading import place_models
from mas_hpc.models.load import count_parameters, load_model
from mas_hpc.run import build
from mas_hpc.teams import served_models
from mas_hpc.types import Trace

ROOT = Path(__file__).parents[2]
MPIEXEC = Path(sys.executable).with_name("mpiexec")
LAUNCHERS = {
    "one": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "mpi": [str(MPIEXEC), "-n", "2", sys.executable],
}
TEAM = """
name: {name}
runs_dir: {folder}
model: {{hidden_size: 32}}
data: {{kind: ring, num_digits: 3, num_train: 8, num_test: 8}}
team: {{topology: debate, rounds: 2, agents: [{{name: ada}}, {{name: ben, policy: other}}], models: {{other: {other}}}}}
rollout: {{max_new_tokens: 12, num_tasks: 8, placement: auto}}
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model of the tiny model's vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "other"
    model, tokenizer = load_model(ModelConfig(hidden_size=64), seed=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(folder: Path, other: Path, name: str = "run") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(TEAM.format(name=name, folder=folder, other=other))
    return file


def rollout(launcher: str, folder: Path, other: Path) -> tuple[str, list[Trace], list[float]]:
    """What `mas-hpc rollout` prints, its traces without times and log-probs, and the log-probs."""
    config = written(folder, other, launcher)
    done = subprocess.run(
        [*LAUNCHERS[launcher], "-m", "mas_hpc", "rollout", str(config)],
        capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = trace_store.parts(folder / launcher / "traces", "rollout")
    traces = sorted((trace for part in parts for trace in trace_store.read(part)), key=lambda trace: trace.task.id)
    timeless = [
        replace(trace, turns=tuple(replace(turn, wall_s=0.0, behavior_logprobs=()) for turn in trace.turns)) for trace in traces
    ]
    return done.stdout, timeless, [logprob for trace in traces for turn in trace.turns for logprob in turn.behavior_logprobs]


@pytest.mark.slow
def test_sharded_ranks_write_the_traces_of_one_process(tmp_path: Path, other: Path) -> None:
    _, alone, logprobs = rollout("one", tmp_path, other)
    assert len(alone) == 8 and {turn.policy for trace in alone for turn in trace.turns} == {"shared", "other"}
    for launcher in ("torchrun", "mpi"):
        if launcher == "mpi" and not MPIEXEC.exists():
            continue
        output, traces, found = rollout(launcher, tmp_path, other)
        assert "placement: sharded" in output
        assert traces == alone
        assert found == pytest.approx(logprobs, abs=1e-5)


# ---- which models there are, and where


def config_of(folder: Path, other: Path, *overrides: str) -> RunConfig:
    return load_config(written(folder, other), overrides)


def test_models_are_those_of_the_team_with_their_sizes_and_turns(tmp_path: Path, other: Path) -> None:
    sizes = {"model.path": 100, "team.models.other": 200}
    main, judge = served_models(config_of(tmp_path, other), lambda key, path: sizes[key])
    assert (main.name, main.policies, main.num_parameters, main.turns) == ("tiny", ("shared", "base"), 100, 2)
    assert (judge.name, judge.policies, judge.num_parameters, judge.turns) == (str(other), ("other",), 200, 2)


def test_parameters_are_counted_without_the_weights(other: Path, tmp_path: Path) -> None:
    model, _ = load_model(ModelConfig(path=str(other)), seed=0)
    (tmp_path / "config.json").write_text((other / "config.json").read_text())
    assert count_parameters(ModelConfig(path=str(tmp_path))) == model.num_parameters()
    assert count_parameters(ModelConfig(hidden_size=64)) == model.num_parameters()


def test_ranks_with_more_to_do_are_more(tmp_path: Path, other: Path) -> None:
    placement = place_models(config_of(tmp_path, other), World(size=4), Console(quiet=True), "auto")
    assert placement.owners == {"shared": (3,), "base": (3,), "other": (0, 1, 2)}


def test_sharding_over_one_rank_is_refused_before_anything_is_loaded(tmp_path: Path, other: Path) -> None:
    config = config_of(tmp_path, other, "rollout.placement=sharded")
    with pytest.raises(LaunchError, match=r"rollout.placement=sharded: 2 models \(tiny, .*other\) on 1 rank"):
        build(config, World(), Console(quiet=True))
    assert not config.folder.exists()


def test_a_model_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"team.models.other='.*nowhere': not tiny or smollm2, no such folder"):
        place_models(config, World(size=2), Console(quiet=True), "auto")


def test_a_team_whose_agents_all_have_models_of_their_own_is_played_by_them(tmp_path: Path, other: Path) -> None:
    team = "team={topology: debate, agents: [{name: ada, policy: one}, {name: ben, policy: two}], models: {one: %s, two: %s}}"
    config = config_of(tmp_path, other, team % (other, other))
    assert place_models(config, World(size=2), Console(quiet=True), "auto").owners == {"one": (0,), "two": (1,)}
    run = build(config, World(), Console(quiet=True), trains=False)
    assert run.other_models.keys() == {"one", "two"}
