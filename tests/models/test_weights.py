"""Weights by name: what one model gives, another takes, or says why not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mas_hpc.checksum import checksum
from mas_hpc.errors import CheckpointError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.weights import assign_weights, named_weights
from mas_hpc.types import BASE_POLICY

POLICIES = ("solver", "critic")


def model_of(seed: int, *, adapters: bool = False) -> tuple[LlamaForCausalLM, AdapterBank | None]:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if not adapters:
        return model, None
    bank = AdapterBank.install(model, POLICIES, rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"), seed=seed)
    for policy in POLICIES:
        for parameter in bank.parameters_of(policy):
            parameter.data.normal_()
    return model, bank


def through_one_buffer(weights: Iterator[tuple[str, str, Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    """As a transport yields them: views into a buffer that the next tensor overwrites."""
    buffer = torch.empty(4096)
    for policy, name, tensor in weights:
        view = buffer[: tensor.numel()].view(tensor.shape)
        yield policy, name, view.copy_(tensor)


def test_a_model_that_takes_the_weights_of_another_gives_the_same_logits() -> None:
    (source, _), (target, _) = model_of(0), model_of(1)
    token_BL = torch.tensor([[1, 2, 3]])
    answer = assign_weights(target, None, through_one_buffer(named_weights(source, None, [BASE_POLICY])))
    assert torch.equal(target(token_BL).logits, source(token_BL).logits)
    assert answer == checksum(named_weights(source, None, [BASE_POLICY]))


def test_only_the_named_policies_are_moved() -> None:
    (source, source_bank), (target, target_bank) = model_of(0, adapters=True), model_of(1, adapters=True)
    assert source_bank and target_bank
    before = checksum(named_weights(target, target_bank, [BASE_POLICY, "solver"]))
    answer = assign_weights(target, target_bank, through_one_buffer(named_weights(source, source_bank, ["critic"])))
    assert answer == checksum(named_weights(target, target_bank, ["critic"]))
    assert answer == checksum(named_weights(source, source_bank, ["critic"]))
    assert checksum(named_weights(target, target_bank, [BASE_POLICY, "solver"])) == before


def test_the_base_under_adapters_is_named_as_in_the_plain_model() -> None:
    (plain, _), (adapted, bank) = model_of(0), model_of(1, adapters=True)
    names = [name for _, name, _ in named_weights(plain, None, [BASE_POLICY])]
    assert sorted(name for _, name, _ in named_weights(adapted, bank, [BASE_POLICY])) == sorted(names)
    assert "lm_head.weight" not in names  # tied: it comes once
    assert assign_weights(adapted, bank, named_weights(plain, None, [BASE_POLICY])) == checksum(
        named_weights(plain, None, [BASE_POLICY])
    )


def test_one_parameter_may_come_alone() -> None:
    model, _ = model_of(0)
    norm = torch.full((8,), 2.0)
    answer = assign_weights(model, None, [(BASE_POLICY, "model.norm.weight", norm)])
    assert torch.equal(model.model.norm.weight, norm)
    assert answer == checksum([(BASE_POLICY, "model.norm.weight", norm)])
    assert assign_weights(model, None, []) == ""


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.bias", torch.ones(8), "model.norm.bias has shape .8,., expected no such parameter"),
        ("model.norm.weight", torch.ones(9), "model.norm.weight has shape .9,., expected .8,."),
        ("model.norm.weight", torch.ones(8).double(), "model.norm.weight is torch.float64, but the model has torch.float32"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        assign_weights(model_of(0)[0], None, [(BASE_POLICY, name, tensor)])


def test_adapters_that_do_not_fit_are_refused() -> None:
    model, bank = model_of(0, adapters=True)
    assert bank
    critic = list(named_weights(model, bank, ["critic"]))
    with pytest.raises(CheckpointError, match="policy 'critic': the model has adapters of \\[\\]"):
        assign_weights(model_of(0)[0], None, critic)
    with pytest.raises(CheckpointError, match="policy 'judge': the model has adapters of \\['solver', 'critic'\\]"):
        assign_weights(model, bank, [("judge", name, tensor) for _, name, tensor in critic])
    with pytest.raises(CheckpointError, match=f"policy 'critic': {critic[-1][1]} has shape missing"):
        assign_weights(model, bank, critic[:-1])
    with pytest.raises(CheckpointError, match=r"is torch\.bfloat16, but the model has"):
        assign_weights(model, bank, [(policy, name, tensor.bfloat16()) for policy, name, tensor in critic])
