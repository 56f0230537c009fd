"""A run that was stopped and goes on is the run that was never stopped: weights, metrics and traces, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mas_hpc.distributed.ddp import Replica
from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError, ConfigError, DataError, RunError, RunStopped
from mas_hpc.resume import Training, mark_finished
from mas_hpc.training.learner import Learner
from tests.phases.resuming import METHODS, assert_same_run, metrics, traces, train, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody stops."""
    runs = tmp_path_factory.mktemp("whole")
    for kind in METHODS:
        train(runs, kind)
    return runs


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> Path:
    """A run of SFT that has ended, with checkpoints of steps 2, 4 and 6, to go back in."""
    shutil.copytree(whole / "sft", tmp_path / "sft")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_that_goes_on_equals_one_that_was_never_stopped(kind: str, whole: Path, tmp_path: Path) -> None:
    train(tmp_path, kind, stop=("train", 2))  # a step after the checkpoint of two is lost
    assert "train: goes on after step 2/6" in train(tmp_path, kind, resume=True)
    assert_same_run(whole / kind, tmp_path / kind)


def test_a_warm_start_goes_on_too_and_is_skipped_once_it_is_over(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "at_grpo", stop=("warm_start", 1))
    said = train(tmp_path, "at_grpo", resume=True, stop=("train", 0))
    assert "warm_start: goes on after step 2/3" in said and "train: goes on" not in said
    said = train(tmp_path, "at_grpo", resume=True)
    assert "warm_start: goes on after step 3/3" in said and "train: goes on" not in said, "it had no checkpoint"
    assert_same_run(whole / "at_grpo", tmp_path / "at_grpo")


def test_noise_goes_on_where_it_was(tmp_path: Path) -> None:
    for name, stop in (("whole", None), ("stopped", ("train", 2))):
        train(tmp_path, "sft", "method.neftune_alpha=5", f"name={name}", stop=stop)
    train(tmp_path, "sft", "method.neftune_alpha=5", "name=stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def poison(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Let the gradients' norms be nan from this step on, counted from 0."""
    clip, update = Replica.clip, Learner.update
    is_poisoned = False

    def clip_to_nan(trained: Replica, active: list[str], max_norm: float) -> dict[str, float]:
        norms = clip(trained, active, max_norm)
        return dict.fromkeys(norms, float("nan")) if is_poisoned else norms

    def update_poisoned(learner: Learner, *inputs: Any) -> dict[str, float]:
        nonlocal is_poisoned
        is_poisoned = learner._num_steps >= first
        return update(learner, *inputs)

    monkeypatch.setattr(Replica, "clip", clip_to_nan)
    monkeypatch.setattr(Learner, "update", update_poisoned)


def test_steps_that_are_not_finite_take_the_weights_back_to_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4)  # the fourth step is taken after the checkpoint of three
    said = train(tmp_path, "sft", "method.max_skipped=2", "method.eval_every=0", "checkpoint.every=3")
    assert said.count("went back to the last checkpoint") == 1
    kept = load_file(tmp_path / "sft" / "checkpoints" / "train_step_3" / "rank_00000.safetensors")
    ours = {name.partition(":")[2]: tensor for name, tensor in weights(tmp_path / "sft").items()}
    assert all(torch.equal(tensor, kept[f"policy/parameter/model.{name}"]) for name, tensor in ours.items())


def test_no_checkpoint_is_taken_of_weights_that_do_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 2)  # else it goes back to a checkpoint of its own streak again and again, and says nothing
    words = ("method.max_skipped=2", "method.eval_every=0", "checkpoint.every=1", "checkpoint.keep_last=1")
    with pytest.raises(RunError, match="so it had after the checkpoint of step 2 once before"):
        train(tmp_path, "sft", *words)
    assert names(tmp_path / "sft") == ["train_step_2"]


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(learner: Learner, *inputs: Any) -> dict[str, float]:
        if learner._num_steps == 5:
            damage(tmp_path, 4, "corrupted")
        return before(learner, *inputs)

    poison(monkeypatch, 4)
    before = Learner.update
    monkeypatch.setattr(Learner, "update", update)
    words = ("method.max_skipped=2", "method.eval_every=0", "checkpoint.asynchronous=false")
    assert "went back" in train(tmp_path, "sft", *words)
    kept = load_file(tmp_path / "sft" / "checkpoints" / "train_step_2" / "rank_00000.safetensors")
    ours = {name.partition(":")[2]: tensor for name, tensor in weights(tmp_path / "sft").items()}
    assert all(torch.equal(tensor, kept[f"policy/parameter/model.{name}"]) for name, tensor in ours.items())


def test_steps_that_are_not_finite_are_counted_on_by_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(learner: Learner, *inputs: Any) -> dict[str, float]:
        world.watch.is_asked_to_end = learner._num_steps == 3
        return before(learner, *inputs)

    poison(monkeypatch, 3)
    world, before = World(), Learner.update
    words = ("method.max_skipped=3", "method.eval_every=0")
    with monkeypatch.context() as asked, pytest.raises(RunStopped):
        asked.setattr(Learner, "update", update)
        train(tmp_path, "sft", *words, world=world)  # the checkpoint of four is one skipped step old, of three
    assert "went back to the last checkpoint" in train(tmp_path, "sft", *words, resume=True)


def test_checkpoints_taken_while_training_goes_on_are_those_taken_while_it_waits(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, "sft", "checkpoint.asynchronous=false", "name=waits")
    for name in names(runs / "sft"):
        ours, theirs = (tmp_path / run / "checkpoints" / name for run in ("sft", "waits"))
        one, other = (load_file(folder / "rank_00000.safetensors") for folder in (ours, theirs))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
        assert (ours / "record.json").read_text() == (theirs / "record.json").read_text()


def test_an_earlier_step_is_gone_back_to_and_what_came_later_is_forgotten(runs: Path, whole: Path) -> None:
    train(runs, "sft", resume=True, step=2, stop=("train", 2))
    assert names(runs / "sft") == ["train_step_2"]
    assert max(line["step"] for line in metrics(runs / "sft") if line["phase"] == "train") == 2
    train(runs, "sft", resume=True)
    assert_same_run(whole / "sft", runs / "sft")


def test_ranks_that_were_started_again_go_on_by_themselves(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "grpo", stop=("train", 2))
    said = train(tmp_path, "grpo", resume=True, world=World(attempt=1))
    assert "train: goes on after step 2/6" in said
    assert_same_run(whole / "grpo", tmp_path / "grpo")


def test_ranks_that_were_started_again_before_any_checkpoint_begin_again(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "grpo", "checkpoint.every=0", stop=("train", 2))
    assert len(traces(tmp_path / "grpo")) > 0
    train(tmp_path, "grpo", "checkpoint.every=0", resume=True, world=World(attempt=1))
    assert_same_run(whole / "grpo", tmp_path / "grpo")


# ---- what cannot be used


def damage(runs: Path, step: int, what: str) -> None:
    folder = runs / "sft" / "checkpoints" / f"train_step_{step}"
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    if what == "truncated":
        file.write_bytes(content[:-100])
    elif what == "corrupted":
        content[-7] ^= 1
        file.write_bytes(content)
    elif what == "missing":
        file.unlink()
    else:
        (folder / "complete.json").unlink()


DAMAGES = {
    "truncated": r"rank_00000\.safetensors has \d+ bytes of \d+", "corrupted": "has another checksum",
    "missing": r"rank_00000\.safetensors is missing", "unmarked": "no completion marker",
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_it_is_used(what: str, runs: Path, whole: Path) -> None:
    damage(runs, 6, what)
    said = train(runs, "sft", resume=True)
    assert "train_step_6" in said and "the one before it counts" in said and "goes on after step 4/6" in said
    assert_same_run(whole / "sft", runs / "sft")


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(what: str, runs: Path) -> None:
    damage(runs, 4, what)
    with pytest.raises(CheckpointError, match=rf"train_step_4: .*{DAMAGES[what]}.*; training has checkpoints of steps 2, 6"):
        train(runs, "sft", resume=True, step=4)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_mistakes_are_said_in_one_message_and_nothing_is_overwritten(runs: Path) -> None:
    before = files(runs / "sft")
    with pytest.raises(CheckpointError, match=r"train_step_3: there is no such checkpoint; .* of steps 2, 4, 6"):
        train(runs, "sft", resume=True, step=3)
    with pytest.raises(ConfigError, match=r"method\.learning_rate: not as in .*config\.yaml"):
        train(runs, "sft", "method.learning_rate=0.1", resume=True)
    with pytest.raises(ConfigError, match=r"--may-differ method\.learning: unknown key; .* such as method\.learning_rate"):
        train(runs, "sft", resume=True, may_differ=("method.learning",))
    with pytest.raises(
        CheckpointError, match=r"is \[\d+, 32\] float32 there and \[\d+, 64\] float32 in this run; .*another model"
    ):
        train(runs, "sft", "model.hidden_size=64", resume=True, may_differ=("model.hidden_size",))
    with pytest.raises(DataError, match=r"no config\.yaml"):
        train(runs, "sft", "name=elsewhere", resume=True)
    after = files(runs / "sft")
    assert {name for name in before if after[name] != before[name]} == {"config.yaml"}, "of the other model, which is told"


def test_a_run_without_checkpoints_cannot_go_on(runs: Path) -> None:
    shutil.rmtree(runs / "sft" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint there \(checkpoint\.every\)"):
        train(runs, "sft", resume=True)


def test_a_run_whose_warm_start_is_damaged_cannot_go_on(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "dpo", tmp_path / "dpo")
    (tmp_path / "dpo" / "checkpoints" / "warm_start_step_3" / "record.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"warm_start_step_3: train_step_6 continues it, and record\.json has 2 bytes"):
        train(tmp_path, "dpo", resume=True)


def test_a_finished_run_says_so_and_may_be_trained_on(runs: Path) -> None:
    mark_finished(runs / "sft", World(), Training(job="train").job)
    with pytest.raises(DataError, match=r"sft: finished \(train, 6 of 6 steps\): nothing is left to do"):
        train(runs, "sft", resume=True)
    before = weights(runs / "sft")
    said = train(runs, "sft", "method.steps=8", resume=True, may_differ=("method.steps",))
    assert "goes on after step 6/8" in said and names(runs / "sft")[-1] == "train_step_8"
    assert [line["step"] for line in metrics(runs / "sft") if line["phase"] == "train"] == list(range(8))
    assert before.keys() == weights(runs / "sft").keys()


def test_keys_that_change_no_trajectory_may_differ(runs: Path, whole: Path) -> None:
    train(runs, "sft", "checkpoint.keep_last=1", "distributed.strategy=fsdp2", "tracking=tensorboard", resume=True, step=2)
    assert json.loads((runs / "sft" / "checkpoints" / "train_step_6" / "complete.json").read_text())["is_end"]
    assert_same_run(whole / "sft", runs / "sft")
