"""The weights of a checkpoint, exported while the run goes on or after it was stopped, are those that it had trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mas_hpc.cli import app
from mas_hpc.errors import CheckpointError, DataError
from mas_hpc.phases.export import export
from tests.phases.resuming import train, weights

QUIET = Console(quiet=True)


@pytest.mark.parametrize("kind", ["sft", "at_grpo", "ppo"])
def test_the_last_checkpoint_is_what_the_run_saves(kind: str, tmp_path: Path) -> None:
    train(tmp_path, kind, "method.eval_every=0")
    exported = export(tmp_path / kind, QUIET)
    assert exported == tmp_path / kind / "export" / "train_step_6"
    ours, theirs = weights(tmp_path / kind), weights(exported)
    assert ours and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_is_exported_where_one_says_and_loads_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "sft", stop=("train", 4))
    app(["export", str(tmp_path / "sft"), "--step", "2", "--to", str(tmp_path / "out")], standalone_mode=False)
    assert f"exported: {tmp_path / 'out'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    saved = load_file(tmp_path / "sft" / "checkpoints" / "train_step_2" / "rank_00000.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), saved[f"policy/parameter/model.{name}"])
    train(tmp_path, "sft", f"model.path={tmp_path}/out/model", "name=again", "method.steps=2")


def test_a_reward_model_is_exported_with_its_head(tmp_path: Path) -> None:
    train(tmp_path, "rm")
    exported = export(tmp_path / "rm", QUIET)
    for file in ("score_head.safetensors", "model.safetensors"):
        ours, theirs = (load_file(folder / "model" / file) for folder in (tmp_path / "rm", exported))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert (exported / "model" / "reward_model.json").read_text() == (
        tmp_path / "rm" / "model" / "reward_model.json"
    ).read_text()


def test_the_warm_start_is_exported_where_nothing_came_after_it(tmp_path: Path) -> None:
    train(tmp_path, "at_grpo", stop=("warm_start", 2))
    exported = export(tmp_path / "at_grpo", QUIET)
    assert exported.name == "warm_start_step_3" and [folder.name for folder in exported.iterdir()] == ["model"]


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.yaml"):
        export(tmp_path, QUIET)
    train(tmp_path, "sft", "checkpoint.every=0")
    with pytest.raises(CheckpointError, match=r"no checkpoint there \(checkpoint\.every\); what a run has trained at its end"):
        export(tmp_path / "sft", QUIET)
