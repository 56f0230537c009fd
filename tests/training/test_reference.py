"""G37: log-probabilities of the reference, computed once and found again on disk."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch

from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.training.network import Network
from mas_hpc.training.reference import COLUMN, with_reference


@pytest.fixture
def samples(make_samples):
    found = [replace(s, columns={"label": (0.5,) * len(s.completion_ids)}) for s in make_samples(3)]
    first = found[3]  # four tokens
    return [*found, replace(first, id="masked", loss_mask=(True, False, True, False))]


def values(samples) -> list[list[float | None]]:
    return [[None if isnan(value) else value for value in sample.columns[COLUMN]] for sample in samples]


def test_g37_the_file_is_found_again_with_the_same_numbers_bit_for_bit(make_model, samples, tmp_path, monkeypatch) -> None:
    network = Network(model=make_model().float())
    first = with_reference(samples, network, World(), cache=tmp_path)
    [file] = tmp_path.iterdir()
    written = file.stat().st_mtime_ns, file.read_bytes()
    passes = []
    network.model.model.register_forward_hook(lambda *_: passes.append(1))
    second = with_reference(samples, network, World(), cache=tmp_path)
    assert values(second) == values(first) and not passes
    assert (file.stat().st_mtime_ns, file.read_bytes()) == written
    assert values(first)[-1][1] is None and values(first)[-1][0] == values(first)[3][0]
    assert all(sample.columns["label"][0] == 0.5 for sample in second), "other columns stay"


def test_g37_it_is_the_policy_in_evaluation_mode_and_leaves_the_generator_alone(make_model, samples, tmp_path) -> None:
    network, modes = Network(model=make_model(), checkpointing=True), []
    network.model.model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with_reference(samples, network, World(), cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(modes) == {(False, False)}


def test_g37_another_weight_token_mask_or_temperature_is_another_file(make_model, samples, tmp_path) -> None:
    network = Network(model=make_model())
    first = with_reference(samples, network, World(), cache=tmp_path)
    for number, changed in enumerate(
        (
            [replace(samples[0], completion_ids=(7,)), *samples[1:]],
            [replace(samples[0], prompt_ids=(*samples[0].prompt_ids[:-1], 7)), *samples[1:]],
            [*samples[:-1], replace(samples[-1], loss_mask=(True, True, True, False))],
        )
    ):
        assert values(with_reference(changed, network, World(), cache=tmp_path)) != values(first)
        assert len(list(tmp_path.iterdir())) == 2 + number
    warmer = with_reference(samples, replace(network, temperature=2.0), World(), cache=tmp_path)
    assert values(warmer) != values(first)
    with torch.no_grad():
        network.model.model.norm.weight[0] += 0.5
    assert values(with_reference(samples, network, World(), cache=tmp_path)) != values(first)
    assert len(list(tmp_path.iterdir())) == 6


def test_g37_the_same_weights_in_another_architecture_or_adapter_scale_are_another_file(make_model, samples, tmp_path) -> None:
    with_reference(samples, Network(model=make_model()), World(), cache=tmp_path)
    other = make_model()
    other.config.rope_parameters["rope_theta"] = 50.0
    with_reference(samples, Network(model=other), World(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for alpha in (4.0, 8.0):
        model = make_model()
        bank = AdapterBank.install(model, ["a", "b"], rank=2, alpha=alpha, target_modules=["q_proj"], seed=0)
        with_reference(samples, Network(model=model, bank=bank), World(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "other tensor", "other length"])
def test_g37_a_damaged_file_is_refused(make_model, samples, tmp_path, damage: str) -> None:
    from safetensors.torch import save_file

    network = Network(model=make_model())
    with_reference(samples, network, World(), cache=tmp_path)
    [file] = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        save_file({COLUMN if damage == "other length" else "x": torch.zeros(3, dtype=torch.float64)}, file)
    with pytest.raises(CheckpointError, match=r"delete the file"):
        with_reference(samples, network, World(), cache=tmp_path)
