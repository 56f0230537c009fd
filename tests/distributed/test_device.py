"""Devices and backends are chosen from what is offered; what is on offer is passed in, so no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mas_hpc.distributed import device as device_module
from mas_hpc.distributed import world as world_module
from mas_hpc.distributed.device import Offer, bound_device, choose, find_offer
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import ConfigError, LaunchError
from tests.distributed.launch import run_ranks

LAPTOP = Offer(devices={}, backends=("gloo",))
AURORA = Offer(devices={"xpu": 12}, backends=("gloo", "xccl"))
OLD_AURORA = Offer(devices={"xpu": 12}, backends=("gloo", "ccl"))
CUDA = Offer(devices={"cuda": 4}, backends=("gloo", "nccl"))


@pytest.mark.parametrize(
    ("offer", "wanted", "device", "group"),
    [
        (LAPTOP, "auto", "cpu", "gloo"),
        (LAPTOP, "cpu", "cpu", "gloo"),
        (AURORA, "auto", "xpu:9", "cpu:gloo,xpu:xccl"),
        (AURORA, "cpu", "cpu", "gloo"),
        (OLD_AURORA, "xpu", "xpu:9", "cpu:gloo,xpu:ccl"),
        (CUDA, "auto", "cuda:3", "cpu:gloo,cuda:nccl"),
        (Offer(devices={"xpu": 1, "cuda": 4}, backends=("gloo", "xccl")), "auto", "xpu:0", "cpu:gloo,xpu:xccl"),
        (Offer(devices={"xpu": 12}, backends=("gloo", "ccl", "xccl")), "auto", "xpu:9", "cpu:gloo,xpu:xccl"),
    ],
)
def test_a_rank_takes_the_best_device_that_there_is_and_its_backend(offer: Offer, wanted, device: str, group: str) -> None:
    chosen = choose(wanted, offer, local_rank=3, local_size=4, size=8)
    assert (str(chosen.device), chosen.group_backend) == (device, group)
    assert chosen.reason.startswith(f"{chosen.kind}: ")


def test_ranks_take_the_first_tile_of_their_share_as_their_cores_are_spread() -> None:
    cards = [choose("auto", AURORA, local_rank=rank, local_size=6, size=12).index for rank in range(6)]
    assert cards == [0, 2, 4, 6, 8, 10]  # one a card: 0-5 are of socket 0, where half of the ranks have no cores
    tiles = [choose("auto", AURORA, local_rank=rank, local_size=12, size=12).index for rank in range(12)]
    assert tiles == list(range(12))


def test_only_xccl_needs_its_device_with_the_group() -> None:
    bound = [bound_device(choose("auto", offer, local_rank=1, local_size=2, size=2)) for offer in (LAPTOP, CUDA, AURORA)]
    assert bound == [None, None, torch.device("xpu", 6)]


def test_a_named_device_that_is_missing_is_an_error_and_no_reason_to_take_another() -> None:
    with pytest.raises(ConfigError, match=r"distributed.device=xpu: .* sees no such device here, but the CPU; .*auto or cpu"):
        choose("xpu", LAPTOP, local_rank=0, local_size=1, size=1)
    with pytest.raises(ConfigError, match=r"distributed.device=cuda: .* but \{'xpu': 12\}"):
        choose("cuda", AURORA, local_rank=0, local_size=1, size=1)


def test_more_ranks_than_devices_is_an_error_but_one_visible_device_is_the_ranks_own() -> None:
    whole_gpus = Offer(devices={"xpu": 6}, backends=("gloo", "xccl"))
    with pytest.raises(LaunchError, match=r"12 ranks on this host, but 6 xpu devices: .*ZE_FLAT_DEVICE_HIERARCHY=FLAT"):
        choose("auto", whole_gpus, local_rank=11, local_size=12, size=24)
    masked = Offer(devices={"xpu": 1}, backends=("gloo", "xccl"))
    assert choose("auto", masked, local_rank=11, local_size=12, size=24).device == torch.device("xpu", 0)


def test_a_missing_backend_stops_several_ranks_and_says_what_failed() -> None:
    broken = Offer(devices={"xpu": 12}, backends=("gloo",), notes=("oneccl_bindings_for_pytorch: AttributeError: exit",))
    with pytest.raises(LaunchError, match=r"none of the backends xccl and ccl \(oneccl.*AttributeError: exit\).*device=cpu"):
        choose("auto", broken, local_rank=0, local_size=2, size=2)
    assert choose("auto", broken, local_rank=0, local_size=1, size=1).backend == ""


# ---- what torch offers


@pytest.fixture
def xpu_of_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 12)
    monkeypatch.setattr(device_module.dist, "is_backend_available", lambda name: name == "gloo")


def test_the_legacy_bindings_may_fail_with_anything_and_are_then_noted(xpu_of_old_torch: None) -> None:
    def broken(name: str) -> object:
        raise AttributeError("module 'os' has no attribute 'exit'")

    assert find_offer(broken) == Offer(
        devices={"xpu": 12}, backends=("gloo",),
        notes=("oneccl_bindings_for_pytorch: AttributeError: module 'os' has no attribute 'exit'",),
    )  # fmt: skip
    assert find_offer(lambda name: object()).backends == ("gloo", "ccl")


def test_the_legacy_bindings_are_left_alone_where_there_is_xccl_or_no_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> object:
        raise AssertionError(name)

    assert find_offer(forbidden).backends
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(device_module.dist, "is_backend_available", lambda name: True)
    assert "xccl" in find_offer(forbidden).backends


def test_the_device_is_set_before_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Xpu:
        @staticmethod
        def set_device(index: int) -> None:
            order.append(("set_device", index))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Xpu)

    def no_store(world: World) -> None:
        order.append(("meet", world.rank))
        raise LaunchError("far enough")

    monkeypatch.setattr(world_module, "find_offer", lambda: AURORA)
    monkeypatch.setattr(world_module, "_open_store", no_store)
    second = World(rank=1, size=2, local_rank=1, local_size=2, launcher="mpi")
    with pytest.raises(LaunchError, match="far enough"), connected(second, "auto"):
        raise AssertionError
    assert order == [("set_device", 6), ("meet", 1)]


def test_a_world_of_one_knows_its_device() -> None:
    with connected(World(), "auto") as world:
        assert world.device == torch.device("cpu") and world.control is None


@pytest.mark.slow
def test_control_traffic_has_a_group_of_its_own_and_ranks_skip_a_step_alike() -> None:
    done = run_ranks("torchrun", 2, str(Path(__file__).with_name("control_ranks.py")))
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} on cpu: all good" in done.stdout for rank in range(2))
