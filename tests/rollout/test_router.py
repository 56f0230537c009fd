"""Requests go to the engine that owns their policy; `base` is the model without its adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from mas_hpc.errors import RolloutError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import BASE_POLICY, Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine, Scope
from mas_hpc.rollout.router import RoutedEngine
from mas_hpc.rollout.scripted import ScriptedEngine

from .conftest import build

POLICIES = ("solver", "critic")
PROMPT = (3, 14, 15, 9, 2, 6)


def ask(policy: str, seed: int = 0, spans: tuple[tuple[str, int], ...] = (("", len(PROMPT)),)) -> Request:
    sampling = SamplingParams(max_new_tokens=8)
    return Request(prompt_ids=PROMPT, prompt_spans=spans, policy=policy, seed=seed, sampling=sampling)


# ---- routing


@pytest.fixture
def engines(tokenizer) -> dict[str, ScriptedEngine]:
    """Each answers with its own letter and the policy's length."""
    return {
        name: ScriptedEngine(lambda request, name=name: f"{name}{len(request.policy)}", tokenizer)
        for name in ("m", "a", "b")
    }  # fmt: skip


def test_answers_come_back_in_the_order_of_the_requests(engines) -> None:
    routed = RoutedEngine(engines["m"], {"alpha": engines["a"], "beta": engines["b"]})
    asked = [ask(policy) for policy in ("beta", "shared", "alpha", "beta", "other", "alpha")]
    assert [completion.text for completion in routed.generate(asked)] == ["b4", "m6", "a5", "b4", "m5", "a5"]
    assert engines["m"].requests == [asked[1], asked[4]] and engines["b"].requests == [asked[0], asked[3]]


def test_an_engine_that_nobody_asks_is_left_alone(engines) -> None:
    routed = RoutedEngine(engines["m"], {"alpha": engines["a"]})
    assert routed.generate([]) == []
    routed.generate([ask("alpha")])
    assert engines["m"].requests == []


def test_new_weights_are_those_of_the_trained_model(engines) -> None:
    routed = RoutedEngine(engines["m"], {"alpha": engines["a"]})
    routed.load(version=3)
    assert [completion.policy_version for completion in routed.generate([ask("shared"), ask("alpha")])] == [3, 0]


# ---- the base policy


@pytest.fixture(scope="module")
def bare() -> PreTrainedModel:
    return prepare(build("llama"))


@pytest.fixture(scope="module")
def adapted(bare: PreTrainedModel) -> tuple[PreTrainedModel, AdapterBank]:
    """The same weights under adapters that have learnt something."""
    model = copy.deepcopy(bare)
    bank = AdapterBank.install(model, POLICIES, rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.5)
    return model, bank


@pytest.mark.parametrize("scope", ["sequence", "speaker"])
def test_base_is_the_model_without_adapters(bare, adapted, tokenizer, scope: Scope) -> None:
    model, bank = adapted
    under, alone = NativeEngine(model, tokenizer, bank=bank, scope=scope), NativeEngine(bare, tokenizer)
    asked = [ask(policy, seed) for seed in range(4) for policy in (BASE_POLICY, *POLICIES)]
    found, expected = under.generate(asked), alone.generate(asked)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        same = one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-10)
        assert same == (asked[number].policy == BASE_POLICY)


def test_in_a_prompt_the_tokens_of_the_base_policy_are_adapted_by_none(bare, adapted, tokenizer) -> None:
    model, bank = adapted
    engine = NativeEngine(model, tokenizer, bank=bank, scope="speaker")
    by_base, by_nobody, by_critic = (
        engine.generate([ask(BASE_POLICY, spans=(("", 2), (writer, 4)))])[0].logprobs for writer in (BASE_POLICY, "", "critic")
    )
    assert by_base == by_nobody == pytest.approx(NativeEngine(bare, tokenizer).generate([ask("any")])[0].logprobs, abs=1e-10)
    assert by_critic != pytest.approx(by_base, abs=1e-6)


def test_any_other_policy_without_an_adapter_is_refused(adapted, tokenizer) -> None:
    model, bank = adapted
    with pytest.raises(RolloutError, match=r"policy 'bass': .*expected one of \['critic', 'solver'\]"):
        NativeEngine(model, tokenizer, bank=bank).generate([ask("bass")])
