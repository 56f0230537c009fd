"""The canary lets a step pass whose weights arrived, and names the engine of one whose weights did not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from mas_hpc.config import ModelConfig
from mas_hpc.distributed.world import World
from mas_hpc.errors import RolloutError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.load import load_model
from mas_hpc.models.weights import assign_weights, named_weights
from mas_hpc.rollout.canary import Canary, Score
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.training.network import Network
from mas_hpc.types import Sample

POLICIES = ("solver", "critic")
CANARY = Canary(prompt_ids=(1, 2, 3), num_tokens=5)
SMALL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.3)


def network_of(seed: int) -> Network:
    model, _ = load_model(SMALL, seed=seed)
    bank = AdapterBank.install(model, POLICIES, rank=2, alpha=4.0, target_modules=("q_proj", "up_proj"), seed=0)
    torch.manual_seed(seed)
    for policy in POLICIES:
        for parameter in bank.parameters_of(policy):
            parameter.data.normal_(std=0.3)
    return Network(model=model, bank=bank)


def score_with(network: Network) -> Score:
    """As a trainer does it: the completions are samples of its own forward pass."""

    def score(requests: Sequence[Request], completions: Sequence[Completion]) -> list[tuple[float, ...]]:
        samples = [
            Sample(
                id="", tree=str(number), agent=request.policy, policy=request.policy, prompt_ids=request.prompt_ids,
                prompt_spans=request.prompt_spans, completion_ids=completion.token_ids,
            )
            for number, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]  # fmt: skip
        annotated = network.annotate(samples, World(), column="trained", read="logprob")
        return [sample.columns["trained"] for sample in annotated]

    return score


def engine_of(network: Network) -> NativeEngine:
    _, tokenizer = load_model(SMALL, seed=0)
    return NativeEngine(network.model, tokenizer, bank=network.bank)


def test_an_engine_with_the_trainers_weights_passes_also_after_they_changed() -> None:
    network = network_of(0)
    engine = engine_of(network)
    for version, shift in ((1, 0.0), (2, 0.1)):
        for parameter in network.bank.parameters_of("critic"):
            parameter.data.add_(shift)
        engine.load(version=version)
        CANARY.check(engine, name="rank 0", version=version, policies=POLICIES, score=score_with(network))


def test_one_adapter_that_was_forgotten_is_named_with_its_engine() -> None:
    trainer, served = network_of(0), network_of(1)
    engine = engine_of(served)
    assign_weights(served.model, served.bank, named_weights(trainer.model, trainer.bank, ["base", "solver"]))
    engine.load(version=4)
    CANARY.check(engine, name="rank 3", version=4, policies=["solver"], score=score_with(trainer))
    with pytest.raises(RolloutError, match=r"engine of rank 3, policy 'critic', version 4: token 0 .* allowed 0.0001"):
        CANARY.check(engine, name="rank 3", version=4, policies=POLICIES, score=score_with(trainer))


def test_an_older_version_is_refused_before_anything_is_scored() -> None:
    engine = engine_of(network_of(0))
    engine.load(version=1)
    with pytest.raises(RolloutError, match="engine of rank 0, policy 'solver': it serves version 1, expected 2"):
        CANARY.check(engine, name="rank 0", version=2, policies=POLICIES, score=lambda *_: pytest.fail("scored"))


@pytest.mark.parametrize(("difference", "passes"), [(0.9e-4, True), (1.1e-4, False), (math.nan, False)])
def test_the_tolerance_is_one_ten_thousandth_of_a_nat(difference: float, passes: bool) -> None:
    _, tokenizer = load_model(SMALL, seed=0)
    engine = ScriptedEngine(lambda request: "12", tokenizer, logprob=-1.0)

    def score(requests: Sequence[Request], completions: Sequence[Completion]) -> list[list[float]]:
        return [[-1.0, -1.0 + difference] for _ in completions]

    if passes:
        CANARY.check(engine, name="rank 0", version=0, policies=["a"], score=score)
    else:
        with pytest.raises(RolloutError, match="token 1 of the canary"):
            CANARY.check(engine, name="rank 0", version=0, policies=["a"], score=score)


def test_an_engine_that_cannot_answer_is_an_error_with_its_reason() -> None:
    _, tokenizer = load_model(SMALL, seed=0)
    failed = Completion(token_ids=(), logprobs=(), text="", finish="error", error="out of memory")
    with pytest.raises(RolloutError, match=r"no answer to the canary prompt of 3 tokens: out of memory"):
        CANARY.check(
            ScriptedEngine(lambda request: failed, tokenizer), name="rank 0", version=0, policies=["a"], score=lambda *_: []
        )
