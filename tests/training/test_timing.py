"""The parts of a step add up to it, each second is charged once, and FLOPs are those of the tree."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mas_hpc.config_distributed import ProfileConfig
from mas_hpc.config_methods import SFTConfig
from mas_hpc.data.token_tree import pack
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.training.flops import ModelCost, peak_flops
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import offline_objective
from mas_hpc.training.network import Network
from mas_hpc.training.profiling import Profiler
from mas_hpc.training.share import Totals
from mas_hpc.training.timing import PARTS, StepTimer, memory_peaks


class Clock:
    """Seconds that pass when told so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_part_inside_another_is_charged_once_and_the_rest_is_other() -> None:
    clock = Clock()
    timer = StepTimer(clock=clock)
    clock.now += 1000
    timer.start()
    with timer.part("rollout"):
        clock.now += 1
        with timer.part("reward"):
            clock.now += 2
        clock.now += 4
    clock.now += 8
    with timer.part("forward"):
        clock.now += 16
    assert timer.lap() == {"time/rollout": 5, "time/reward": 2, "time/forward": 16, "time/other": 8, "time/step": 31}
    clock.now += 1
    assert timer.lap() == {"time/other": 1, "time/step": 1}, "a step begins where the last one ended"


def test_a_part_that_fails_is_closed() -> None:
    clock = Clock()
    timer = StepTimer(clock=clock)
    with pytest.raises(KeyError), timer.part("sync"):
        clock.now += 3
        raise KeyError
    assert timer.lap() == {"time/sync": 3, "time/step": 3}


def test_the_device_is_waited_for_at_the_end_of_a_part_where_asked() -> None:
    clock, waited = Clock(), []

    def synchronize() -> None:
        clock.now += 5
        waited.append(clock.now)

    timer = StepTimer(clock=clock, synchronize=synchronize)
    with timer.part("forward"):
        pass
    assert timer.lap() == {"time/forward": 5, "time/step": 5} and len(waited) == 1


def test_flops_count_what_is_not_rollout_against_the_peak_of_all_ranks() -> None:
    clock = Clock()
    timer = StepTimer(clock=clock, ranks=2, peak=lambda: 100.0)
    timer.start()
    with timer.part("rollout"):
        clock.now += 6
    for flops in (300.0, 100.0):
        metrics = {"tokens": 10.0, "flops": flops, "loss": 1.0, "memory/rss_mib/max": flops}
        timer.collect(metrics)
        assert metrics == {"tokens": 10.0, "loss": 1.0}
    clock.now += 4
    found = timer.lap()
    assert found["mfu"] == pytest.approx(400 / (4 * 2 * 100)) and found["tokens_per_s"] == 2.0
    assert found["memory/rss_mib/max"] == 300.0
    timer.collect({"tokens": 10.0, "flops": 1.0})
    unknown = StepTimer(clock=clock)
    unknown.collect({"tokens": 10.0, "flops": 1.0})
    clock.now += 1
    assert "mfu" in timer.lap() and "mfu" not in unknown.lap()


def test_the_peak_is_measured_once() -> None:
    asked = []
    timer = StepTimer(peak=lambda: asked.append(1))
    timer.start(), timer.start()
    assert asked == [1]


# ---- FLOPs


def test_a_step_costs_six_flops_a_parameter_and_token_and_twelve_a_pair_and_width(make_model) -> None:
    model = make_model()
    cost = ModelCost.of(model)
    # one layer: q, k, v, o of 16 x 16, three of 16 x 24, two norms of 16; the last norm; a tied head of 19 x 16
    layers = 2 * (4 * 256 + 3 * 384 + 2 * 16) + 16
    assert cost == ModelCost(layers=layers, trained=layers, head=304, trained_head=304, attention=2 * 2 * 8)
    position_T = torch.tensor([0, 1, 2, 1])  # two children of the root, one of them with a child: 1 + 2 + 3 + 2 pairs
    assert cost.step(position_T, predictors=3) == 6 * layers * 4 + 6 * 304 * 3 + 12 * 32 * 8


def test_a_frozen_base_has_no_gradients_of_weights_and_a_token_meets_one_adapter(make_model) -> None:
    model = make_model()
    frozen = ModelCost.of(model).layers
    bank = AdapterBank.install(model, ["a", "b"], rank=2, alpha=4.0, target_modules=("q_proj",), seed=0)
    cost = ModelCost.of(model, adapters=2)
    adapter = sum(parameter.numel() for parameter in bank.parameters_of("a"))
    assert (cost.layers, cost.trained, cost.trained_head) == (frozen + adapter, adapter, 0)
    assert cost.step(torch.zeros(5), predictors=0) == 4 * frozen * 5 + 6 * adapter * 5 + 12 * 32 * 5


def test_pytorch_counts_the_same_matrix_products(make_model) -> None:
    """All but the norms, which are no products of matrices, and the attention, whose kernel pytorch counts as a full square."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(tied=False)
    cost = ModelCost.of(model)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    tokens = torch.arange(7)[None]
    with FlopCounterMode(display=False) as counter:
        hidden = model.model.embed_tokens(tokens)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            hidden = hidden + attention.o_proj(attention.q_proj(hidden) + attention.k_proj(hidden) + attention.v_proj(hidden))
            hidden = hidden + mlp(hidden)
        model.lm_head(hidden).sum().backward()
    products = replace(cost, layers=cost.layers - norms, trained=cost.trained - norms, attention=0)
    assert counter.get_total_flops() == products.step(torch.zeros(7), predictors=7)


def test_a_cpus_peak_is_measured_and_a_tile_of_aurora_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14

    class Xpu:
        @staticmethod
        def get_device_name(device: torch.device) -> str:
            return "Intel(R) Data Center GPU Max 1550"

    monkeypatch.setattr(torch, "get_device_module", lambda device: Xpu)
    assert peak_flops(torch.device("xpu", 3), torch.bfloat16) == 298.2e12
    assert peak_flops(torch.device("xpu", 3), torch.float32) is None


# ---- what a learner and a profiler tell


def test_a_learner_times_its_parts_and_counts_all_its_forests(make_model, make_samples) -> None:
    samples = [replace(sample, columns={}) for sample in make_samples()]
    network, timer = Network(model=make_model(), max_tree_tokens=40), StepTimer(peak=lambda: 1e9)
    learner = Learner(network, DataParallel(World()), SFTConfig(steps=3), timer=timer)
    timer.start()
    metrics = learner.update(samples, offline_objective(SFTConfig()), Totals.of(samples))
    found = timer.lap()
    assert not {"flops", "memory/rss_mib/max"} & metrics.keys()
    assert {"time/forward", "time/backward", "time/communication", "time/optimizer", "time/other"} < found.keys()
    parts = [seconds for name, seconds in found.items() if name.startswith("time/") and name != "time/step"]
    assert sum(parts) == pytest.approx(found["time/step"], rel=1e-9)
    trees = [pack(part, adapters={}, scope="sequence") for part, _ in network.forests(samples)]
    assert len(trees) > 1
    flops = sum(ModelCost.of(network.model).step(tree.position_T, len(tree.target_N)) for tree in trees)
    assert found["mfu"] * found["time/step"] * 1e9 == pytest.approx(flops)
    learner.evaluate(samples, offline_objective(SFTConfig()))
    assert timer.lap().keys() == {"time/other", "time/step"}, "looks are charged by who looks"


def test_memory_is_at_least_what_a_process_with_torch_takes() -> None:
    assert memory_peaks(torch.device("cpu"))["memory/rss_mib/max"] > 100


def test_the_chosen_steps_of_training_are_traced(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 1, ProfileConfig(first=1, count=2))
    for phase in ("warm_start", "train"):
        for step in range(4):
            profiler.begin(phase, step)
            torch.ones(4) @ torch.ones(4)
            profiler.end(step)
    files = sorted((tmp_path / "profile").iterdir())
    assert [file.name for file in files] == ["rank_1_step_1.json.gz", "rank_1_step_2.json.gz"]
    names = {event["name"] for event in json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"] if "name" in event}
    assert "aten::dot" in names


def test_every_part_has_a_name_of_its_own() -> None:
    assert len(set(PARTS)) == len(PARTS) and "other" not in PARTS and "step" not in PARTS
