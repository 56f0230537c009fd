"""What is saved loads again as the same model: reward models with their head, adapters, and the base they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mas_hpc.config import ModelConfig
from mas_hpc.distributed.world import World
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.heads import ScalarHead
from mas_hpc.models.load import load_model
from mas_hpc.training.export import save
from mas_hpc.training.network import Network
from mas_hpc.types import Sample

SIZE = 32
POLICIES = ["solver", "critic"]
SAMPLES = [
    Sample(
        id=str(n), tree=str(n), agent="solver", policy="solver", prompt_ids=(1, 2, n), prompt_spans=(("", 3),),
        completion_ids=(5, 6, n),
    )
    for n in range(4)
]  # fmt: skip


def install(model) -> AdapterBank:
    return AdapterBank.install(model, POLICIES, rank=2, alpha=4.0, target_modules=["q_proj", "down_proj"], seed=0)


@pytest.fixture
def network() -> Network:
    """Without and with a bank: `adapted` below gives it one."""
    model, _ = load_model(ModelConfig(hidden_size=SIZE, num_heads=2), seed=0)
    return Network(model=model, head=ScalarHead(SIZE, seed=1))


@pytest.fixture
def tokenizer():
    return load_model(ModelConfig(hidden_size=SIZE, num_heads=2), seed=0)[1]


def adapted(network: Network, *, head: bool = True) -> Network:
    bank = install(network.model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for policy in POLICIES:
            for parameter in bank.parameters_of(policy):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Network(model=network.model, bank=bank, head=network.head if head else None)


def read(network: Network, what: str, **options) -> torch.Tensor:
    annotated = network.annotate(SAMPLES, World(), column="c", read=what, **options)
    return torch.tensor([value for sample in annotated for value in sample.columns["c"]])


def load(folder: Path) -> Network:
    model, _ = load_model(ModelConfig(path=str(folder)), seed=9)
    has_head = (folder / "score_head.safetensors").is_file()
    return Network(model=model, head=ScalarHead.load(folder, SIZE) if has_head else None)


def test_a_reward_model_scores_the_same_when_loaded_again(network: Network, tokenizer, tmp_path: Path) -> None:
    save(tmp_path, network, tokenizer, base_model="tiny", base_trained=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = load(tmp_path / "model")
    torch.testing.assert_close(read(loaded, "score"), read(network, "score"), rtol=0, atol=1e-6)
    torch.testing.assert_close(read(loaded, "logprob"), read(network, "logprob"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_trained", [False, True])
def test_a_reward_model_under_an_adapter_is_saved_merged(network: Network, tokenizer, tmp_path: Path, base_trained) -> None:
    plain = read(network, "score")
    trained = adapted(network)
    scores = read(trained, "score")
    assert (scores - plain).abs().max() > 0.1
    save(tmp_path, trained, tokenizer, base_model="tiny", base_trained=base_trained)
    torch.testing.assert_close(read(load(tmp_path / "model"), "score"), scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(read(trained, "score"), scores, rtol=0, atol=0)


def test_the_adapters_of_a_reward_model_name_the_base_and_not_the_merged_model(
    network: Network, tokenizer, tmp_path: Path
) -> None:
    trained = adapted(network)
    save(tmp_path, trained, tokenizer, base_model="tiny", base_trained=True)
    config = json.loads((tmp_path / "adapters" / "solver" / "adapter_config.json").read_text())
    again = load(Path(config["base_model_name_or_path"]))
    bank = install(again.model)
    for policy in POLICIES:
        bank.load(policy, tmp_path / "adapters" / policy)
    found = Network(model=again.model, bank=bank, head=trained.head)
    torch.testing.assert_close(read(found, "score"), read(trained, "score"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_trained", [False, True])
def test_adapters_are_exported_and_the_base_only_if_it_was_trained(network: Network, tokenizer, tmp_path, base_trained) -> None:
    trained = adapted(network, head=False)
    save(tmp_path, trained, tokenizer, base_model="tiny", base_trained=base_trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"] + ["model"] * base_trained
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == sorted(POLICIES)
    config = json.loads((tmp_path / "adapters" / "critic" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (str(tmp_path / "model") if base_trained else "tiny")
    if base_trained:
        base = load(tmp_path / "model")
        torch.testing.assert_close(read(base, "logprob"), read(trained, "logprob", base=True), rtol=0, atol=1e-6)


def test_what_was_saved_before_is_replaced_whole(network: Network, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.bin").write_text("old")
    (tmp_path / "model.unfinished").mkdir()
    save(tmp_path, network, tokenizer, base_model="tiny", base_trained=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale.bin").exists()
