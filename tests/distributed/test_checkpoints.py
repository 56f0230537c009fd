"""Checkpoints as files: written, found, pruned and refused; tensors come back bit for bit."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mas_hpc.config_distributed import CheckpointConfig
from mas_hpc.distributed import checkpoint_files as files
from mas_hpc.distributed import checkpoints as module
from mas_hpc.distributed.checkpoint_files import Marker, Position
from mas_hpc.distributed.checkpoints import Checkpoints, State
from mas_hpc.distributed.trained_state import start_optimizer, state_of
from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError


def store(root: Path, **settings: object) -> Checkpoints:
    return Checkpoints(World(), root, CheckpointConfig(**settings))  # type: ignore[arg-type]


def at(step: int, phase: files.Phase = "train") -> Position:
    return Position(phase=phase, step=step)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "parameter/matrix": torch.randn(3, 5, generator=generator),
        "parameter/turned": torch.randn(5, 3, generator=generator, dtype=torch.float64).T,
        "parameter/half": torch.randn(7, generator=generator).bfloat16(),
        "optimizer/matrix/step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(9),
    }


def written(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_tensors_of_every_kind_and_plain_data_come_back_bit_for_bit(tmp_path: Path) -> None:
    kept, own = tensors(), torch.Generator().manual_seed(5).get_state()
    checkpoints = store(tmp_path)
    checkpoints.save(at(4), {"policy": State(tensors=kept, own={"noise": own}, record={"third": 1 / 3, "nan": float("nan")})})
    checkpoints.close()
    saved = store(tmp_path).open(at(4)).under("policy")
    empty = {name: torch.full_like(tensor, 9) for name, tensor in kept.items()}
    noise = torch.zeros_like(own)
    saved.fill(empty)
    saved.fill_own({"noise": noise})
    assert all(torch.equal(kept[name], empty[name]) for name in kept) and torch.equal(own, noise)
    assert saved.record["third"] == 1 / 3 and saved.record["nan"] != saved.record["nan"]
    assert not [file for file in (tmp_path / "train_step_4").iterdir() if file.suffix not in (".safetensors", ".json")]


def test_what_is_trained_on_meanwhile_is_not_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), module.write

    def write_later(*args: object) -> None:
        assert may_write.wait(10)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write", write_later)
    weight = torch.zeros(4)
    checkpoints = store(tmp_path)
    checkpoints.save(at(1), {"policy": State(tensors={"w": weight})})
    weight += 1  # before a byte is on disk
    may_write.set()
    checkpoints.close()
    found = torch.ones(4)
    checkpoints.open(at(1)).under("policy").fill({"w": found})
    assert torch.equal(found, torch.zeros(4))


def test_an_error_of_the_thread_comes_up_at_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(at(1), {"policy": State(tensors=tensors())})
    checkpoints.wait()

    def fail(*args: object) -> None:
        raise CheckpointError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write", fail)
        checkpoints.save(at(2), {"policy": State(tensors=tensors())})
        with pytest.raises(CheckpointError, match="no room; the checkpoints before it are as they were"):
            checkpoints.save(at(3), {"policy": State(tensors=tensors())})
    assert written(tmp_path) == ["train_step_1"]
    checkpoints.close()  # it was said once


def test_only_what_is_worth_it_is_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep_last=2)
    for step, score in ((2, None), (4, None), (6, None)):
        checkpoints.save(at(step, "warm_start"), {}, is_end=step == 6, score=score)
    checkpoints.wait()
    assert written(tmp_path) == ["warm_start_step_4", "warm_start_step_6"]
    for step, score in ((1, 0.1), (2, 0.7), (3, 0.7), (4, 0.3), (5, None), (10, None)):
        checkpoints.save(at(step), {}, score=score)
    checkpoints.close()
    assert written(tmp_path) == ["train_step_10", "train_step_2", "train_step_5", "warm_start_step_6"]


def marker(step: int, score: float | None = None) -> Marker:
    return Marker(position=at(step), is_end=False, score=score, world_size=1, files={})


def test_the_last_whole_checkpoint_is_always_kept_and_the_best_only_if_asked() -> None:
    markers = [marker(2, -0.5), marker(4, float("-inf")), marker(10)]
    assert [position.step for position in files.worth_keeping(markers, keep_last=1, keep_best=True)] == [10, 2]
    assert [position.step for position in files.worth_keeping(markers, keep_last=1, keep_best=False)] == [10]


def test_what_an_attempt_left_half_written_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(at(2), {"policy": State(tensors=tensors())})
    checkpoints.close()
    (tmp_path / "train_step_4.unfinished").mkdir()
    (tmp_path / "train_step_6").mkdir()
    (tmp_path / "train_step_6" / "complete.json").write_text('{"position": {"phase": "train"')
    (tmp_path / "notes").mkdir()
    said: list[str] = []
    assert store(tmp_path).find(None, said.append) == at(2)
    assert len(said) == 1 and "train_step_6" in said[0] and "no completion marker" in said[0]
    store(tmp_path).forget_after(at(2))
    assert written(tmp_path) == ["notes", "train_step_2"]


def test_when_every_checkpoint_is_damaged_it_is_an_error(tmp_path: Path) -> None:
    assert store(tmp_path / "none").find(None, print) is None
    (tmp_path / "train_step_6").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint there is whole; start a new run"):
        store(tmp_path).find(None, lambda text: None)


def test_a_checkpoint_is_marked_after_its_files_are_on_disk_and_unmarked_before_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    force = files.force_to_disk

    def forced(path: Path) -> None:
        calls.append(f"{path.name} marked={(tmp_path / 'train_step_2' / 'complete.json').exists()}")
        force(path)

    monkeypatch.setattr(files, "force_to_disk", forced)
    unfinished = tmp_path / "train_step_2.unfinished"
    unfinished.mkdir()
    files.publish(unfinished, marker(2))
    assert calls == [
        "train_step_2.unfinished marked=False", f"{tmp_path.name} marked=False", "complete.json.unfinished marked=False",
        "train_step_2 marked=True",
    ]  # fmt: skip
    monkeypatch.setattr(files.shutil, "rmtree", lambda folder: calls.append(str(list(folder.iterdir()))))
    files.remove(tmp_path / "train_step_2")
    assert calls[-1] == "[]"


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor])
def test_an_optimizer_is_given_a_state_for_those_that_had_one_and_nothing_moves(make: type[torch.optim.Optimizer]) -> None:
    def trained(started: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        optimizer = make([{"params": [p]} for p in net.parameters()], lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]
        if started:
            net[0](torch.ones(3)).sum().backward()
            optimizer.step()
        return net, optimizer

    net, optimizer = trained(True)
    states = state_of(net, optimizer)
    assert any(name.startswith("optimizer/0.weight/") for name in states)
    assert not any(name.startswith("optimizer/1.") for name in states), "idle ones have none"
    other, fresh = trained(False)
    before = [parameter.clone() for parameter in other.parameters()]
    start_optimizer(other, fresh, {"0.weight", "0.bias"})
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in states.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state_of(other, fresh).items()} == kinds
    assert all(torch.equal(one, two) for one, two in zip(before, other.parameters(), strict=True))
    assert [group["lr"] for group in fresh.param_groups] == [0.1] * 4
