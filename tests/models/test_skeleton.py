"""A skeleton with the weights of its folder read in is the model that load_model loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mas_hpc.config import ModelConfig
from mas_hpc.distributed.trained_state import give_memory
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.load import _tiny_tokenizer, load_model
from mas_hpc.models.skeleton import Skeleton, build_skeleton, saved_tensors
from mas_hpc.training.learner import fill_from

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def save(folder: Path, *, tied: bool = True, **changes: object) -> ModelConfig:
    shape = {
        "vocab_size": 28, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 512, "tie_word_embeddings": tied, "bos_token_id": None, "pad_token_id": 26,
        "eos_token_id": 27,
    }  # fmt: skip
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="bfloat16")


def filled(skeleton: Skeleton) -> PreTrainedModel:
    give_memory(skeleton.model, torch.device("cpu"))
    fill_from(skeleton.folder, {f"model.{name}": tensor for name, tensor in skeleton.model.named_parameters()})
    return skeleton.model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, LLAMA3])
def test_a_filled_skeleton_is_the_loaded_model(tmp_path: Path, tied: bool, rope: dict[str, object]) -> None:
    config = save(tmp_path, tied=tied, rope_parameters=rope)
    skeleton = build_skeleton(config)
    assert isinstance(skeleton, Skeleton)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    expected, _ = load_model(config, seed=0)
    found = filled(skeleton)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (found, expected))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied
    assert not found.training


def test_saved_tensors_are_those_of_the_loaded_model_with_adapters_of_memory(tmp_path: Path) -> None:
    config = save(tmp_path)
    skeleton = build_skeleton(config)
    assert isinstance(skeleton, Skeleton)
    expected, _ = load_model(config, seed=0)
    for model in (skeleton.model, expected):
        AdapterBank.install(
            model, ["a"], rank=2, alpha=4.0, target_modules=["q_proj"], seed=3, device=torch.device("cpu")
        )  # fmt: skip
    found, there = list(saved_tensors(skeleton.model, skeleton.folder)), sorted(expected.state_dict().items())
    assert [name for name, _ in found] == [name for name, _ in there]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for (_, one), (_, other) in zip(found, there, strict=True))


def test_what_has_no_skeleton_is_said(tmp_path: Path) -> None:
    assert build_skeleton(ModelConfig(path="tiny")) == "it is built in code, not read from files"
    config = save(tmp_path / "named")
    file = tmp_path / "named" / "model.safetensors"
    file.rename(file.with_suffix(".bin"))
    assert build_skeleton(config) == "its files do not hold model.embed_tokens.weight as the model names it"
