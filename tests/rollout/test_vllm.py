"""vLLM's engine against transformers and the native engine. Most of it is skipped without vLLM: see `make test-vllm`."""

import copy
import math

import pytest
import torch
from transformers import PreTrainedModel

from mas_hpc.checksum import checksum
from mas_hpc.config import RolloutConfig
from mas_hpc.errors import CheckpointError
from mas_hpc.models.attention import prepare
from mas_hpc.models.weights import named_weights
from mas_hpc.rollout.engine import BASE_POLICY, Completion, Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.saved_model import save_for_serving
from mas_hpc.rollout.vllm import vllm_engine

from .conftest import small_bank, small_model, vllm_config

PROMPTS = [(1, 2, 3), (4, 5), tuple(i % 30 + 1 for i in range(70)), (1, 2, 4)]
"""The third is longer than two blocks of keys and values, so that later requests share them."""


def asked(policy: str = "shared", count: int = 12, **sampling) -> list[Request]:
    params = SamplingParams(**({"max_new_tokens": 8} | sampling))
    return [
        Request(prompt_ids=prompt, prompt_spans=(("", len(prompt)),), policy=policy, seed=seed, sampling=params)
        for seed, prompt in zip(range(count), PROMPTS * count, strict=False)
    ]


def reference(model: PreTrainedModel, request: Request, completion: Completion) -> list[float]:
    """Log-probs of the completion, token by token, by a plain forward pass in float64 and the definitions."""
    params, length = request.sampling, len(request.prompt_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *completion.token_ids]])).logits[0]
    logprobs = []
    for row, token in zip(logits[length - 1 :], completion.token_ids, strict=False):
        ordered = (row / (params.temperature or 1.0)).sort(descending=True)
        kept = ordered.values[: params.top_k or None].softmax(-1)
        if params.top_p < 1:
            number = int((kept.cumsum(-1) < params.top_p).sum()) + 1
            kept = kept[:number] / kept[:number].sum()
        place = ordered.indices.tolist().index(token)
        logprobs.append(math.log(kept[place]))
    return logprobs


def assert_logprobs_are(model: PreTrainedModel, requests: list[Request], completions: list[Completion]) -> None:
    for request, completion in zip(requests, completions, strict=True):
        assert completion.finish in ("stop", "length"), completion.error
        assert completion.logprobs == pytest.approx(reference(model, request, completion), abs=1e-4)


# ---- the distribution


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_p": 0.7},
        {"top_k": 5},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 9},
        {"temperature": 0.0},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 2},
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_that_was_sampled(vllm_plain, sampling):
    requests = asked(**sampling)
    if sampling.get("temperature") == 0:
        sampling = {"temperature": 0.0}  # greedy: of temperature 1, and nothing is cut away
    plain = [copy.copy(request) for request in asked(**sampling)]
    assert_logprobs_are(small_model().double(), plain, vllm_plain.generate(requests))


def test_greedy_and_sampled_rows_in_one_batch_keep_their_own_distributions(vllm_plain):
    requests = [*asked(temperature=0.0, count=4), *asked(temperature=1.5, count=4), *asked(top_k=3, count=4)]
    assert_logprobs_are(small_model().double(), requests, vllm_plain.generate(requests))


def test_sampled_tokens_have_the_frequencies_of_their_logprobs(vllm_plain):
    requests = [
        Request(
            prompt_ids=(1, 2), prompt_spans=(("", 2),), policy="shared", seed=seed,
            sampling=SamplingParams(max_new_tokens=1, temperature=0.8),
        )
        for seed in range(2000)
    ]  # fmt: skip
    first = [(completion.token_ids[0], completion.logprobs[0]) for completion in vllm_plain.generate(requests)]
    drawn = [token for token, _ in first]
    for token, logprob in set(first):
        expected = math.exp(logprob)
        deviation = math.sqrt(expected * (1 - expected) / len(drawn))
        assert abs(drawn.count(token) / len(drawn) - expected) < 4.5 * deviation + 1e-9


def test_greedy_tokens_are_the_native_engines(vllm_plain, tokenizer):
    native = NativeEngine(prepare(small_model()), tokenizer)
    requests = asked(temperature=0.0, max_new_tokens=30)
    for ours, theirs in zip(native.generate(requests), vllm_plain.generate(requests), strict=True):
        assert theirs.token_ids == ours.token_ids
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
        assert (theirs.text, theirs.finish) == (ours.text, ours.finish)


def test_a_request_gives_the_same_tokens_whatever_is_in_the_batch(vllm_plain):
    requests = asked(count=8)
    together = vllm_plain.generate(requests)
    for request, completion in zip(requests[::3], together[::3], strict=True):
        assert vllm_plain.generate([request])[0].token_ids == completion.token_ids


def test_the_seed_decides_and_only_its_low_32_bits(vllm_plain):
    def of(seed: int) -> tuple[int, ...]:
        request = Request(
            prompt_ids=(1, 2), prompt_spans=(("", 2),), policy="shared", seed=seed, sampling=SamplingParams(max_new_tokens=12)
        )
        return vllm_plain.generate([request])[0].token_ids

    assert of(5) == of(5 + 2**40) != of(6)
    assert of(2**32 - 1) == of(2**32 - 1)


def test_temperatures_that_vllm_would_raise_are_refused(vllm_plain):
    (completion,) = vllm_plain.generate(asked(temperature=0.005, count=1))
    assert completion.finish == "error" and "temperature=0.005" in completion.error


def test_sampling_leaves_the_generators_of_the_process_alone(vllm_plain):
    torch.manual_seed(3)
    expected = torch.rand(3).tolist()
    torch.manual_seed(3)
    vllm_plain.generate(asked(count=2))
    assert torch.rand(3).tolist() == expected


def test_shared_prefixes_are_prefilled_once(vllm_plain):
    vllm_plain.load(version=0)
    prompt = tuple(i % 30 + 1 for i in range(120))
    size = vllm_plain._engine.vllm_config.cache_config.block_size
    shared = 119 // size * size
    request = Request(
        prompt_ids=prompt, prompt_spans=(("", 120),), policy="shared", seed=0, sampling=SamplingParams(max_new_tokens=2)
    )
    before = vllm_plain.stats
    vllm_plain.generate([request])
    vllm_plain.generate([request])
    done = vllm_plain.stats - before
    assert (done.prompt_tokens, done.prefilled_tokens) == (240, 240 - shared)
    assert shared > 0 and done.decoded_tokens == 4


def test_rows_that_were_set_back_for_want_of_room_continue_as_they_would_have(vllm_plain, tokenizer, tmp_path, monkeypatch):
    config = vllm_config().model_copy(update={"rollout": RolloutConfig(engine="vllm", kv_gib=0.0003, max_rows=8)})
    folder, _ = save_for_serving(small_model(), tokenizer, None, tmp_path)
    tight = vllm_engine(config, folder, tokenizer, {})
    scheduler, set_back = tight._engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def counted(*given, **named) -> None:
        set_back.append(given)
        preempt(*given, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    requests = asked(count=8, max_new_tokens=50)
    preempted = tight.generate(requests)
    assert [c.token_ids for c in preempted] == [c.token_ids for c in vllm_plain.generate(requests)]
    assert_logprobs_are(small_model().double(), requests, preempted)
    assert set_back


# ---- adapters


def test_each_request_is_adapted_by_its_policy(vllm_adapted):
    requests = [
        *asked(policy="solver", count=5), *asked(policy="critic", count=5), *asked(policy=BASE_POLICY, count=5),
    ]  # fmt: skip
    completions = vllm_adapted.generate(requests)
    model = small_model()
    bank = small_bank(model)
    for number, policy in enumerate(("solver", "critic")):
        merged = small_model()
        merged.load_state_dict(bank.merged_state_dict(model, policy))
        part = slice(5 * number, 5 * number + 5)
        assert_logprobs_are(merged.double(), requests[part], completions[part])
    assert_logprobs_are(small_model().double(), requests[10:], completions[10:])
    tokens = [[completion.token_ids for completion in completions[start : start + 5]] for start in (0, 5, 10)]
    assert tokens[0] != tokens[1] != tokens[2]


def test_a_new_adapter_is_served_from_the_next_request_on(vllm_adapted):
    model = small_model()
    bank = small_bank(model)
    old = list(named_weights(model, bank, ["solver"]))
    bank.assign("solver", {name: -tensor for name, tensor in bank.tensors("critic").items()})
    new = list(named_weights(model, bank, ["solver"]))
    before = vllm_adapted.generate(asked(policy="critic"))
    assert vllm_adapted.load(version=7, weights=new) == checksum(new)
    requests = asked(policy="solver")
    completions = vllm_adapted.generate(requests)
    merged = small_model()
    merged.load_state_dict(bank.merged_state_dict(model, "solver"))
    assert_logprobs_are(merged.double(), requests, completions)
    assert {completion.policy_version for completion in completions} == {7}
    base = [*asked(policy="solver", count=2), *asked(policy=BASE_POLICY, count=4)]
    assert_logprobs_are(small_model().double(), base[2:], vllm_adapted.generate(base)[2:])
    after = vllm_adapted.generate(asked(policy="critic"))
    assert [c.token_ids for c in after] == [c.token_ids for c in before], "the other policy keeps its adapter"
    vllm_adapted.load(version=0, weights=old)


def test_the_base_model_changes_under_adapters_that_stay(vllm_adapted):
    model = other_model()
    bank = small_bank(model)
    base = [("base", name, tensor) for name, tensor in small_model().named_parameters()]
    vllm_adapted.load(version=1, weights=named_weights(model, None, [BASE_POLICY]))
    requests = [*asked(policy="solver", count=4), *asked(policy=BASE_POLICY, count=4)]
    completions = vllm_adapted.generate(requests)
    merged = small_model()
    merged.load_state_dict(bank.merged_state_dict(model, "solver"))
    assert_logprobs_are(merged.double(), requests[:4], completions[:4])
    assert_logprobs_are(other_model().double(), requests[4:], completions[4:])
    vllm_adapted.load(version=0, weights=base)


def test_part_of_an_adapter_is_refused(vllm_adapted):
    model = small_model()
    weights = list(named_weights(model, small_bank(model), ["solver"]))
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight has shape missing"):
        vllm_adapted.load(version=1, weights=weights[1:])
    with pytest.raises(CheckpointError, match=r"policy 'judge'.*'critic', 'solver'"):
        vllm_adapted.load(version=1, weights=[("judge", name, tensor) for _, name, tensor in weights])


# ---- weights


def other_model() -> PreTrainedModel:
    """`small_model` with every weight moved, norms too."""
    model = small_model()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def test_new_weights_by_name_are_those_that_sample(vllm_plain):
    old, new = (list(named_weights(model, None, [BASE_POLICY])) for model in (small_model(), other_model()))
    requests = asked()
    before = vllm_plain.generate(requests)
    assert vllm_plain.load(version=2, weights=iter(new)) == checksum(new)
    after = vllm_plain.generate(requests)
    assert_logprobs_are(other_model().double(), requests, after)
    assert [completion.logprobs for completion in after] != [completion.logprobs for completion in before]
    assert vllm_plain.load(version=0, weights=old) == checksum(old)
    again = vllm_plain.generate(requests)
    assert [completion.token_ids for completion in again] == [completion.token_ids for completion in before]


def test_weights_may_come_in_a_buffer_that_is_used_again(vllm_plain):
    new = list(named_weights(other_model(), None, [BASE_POLICY]))
    buffer = torch.empty(max(tensor.numel() for _, _, tensor in new))

    def streamed(weights):
        for policy, name, tensor in weights:
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor.detach())
            yield policy, name, view

    requests = asked(count=4)
    assert vllm_plain.load(version=2, weights=streamed(new)) == checksum(new)
    assert_logprobs_are(other_model().double(), requests, vllm_plain.generate(requests))
    vllm_plain.load(version=0, weights=named_weights(small_model(), None, [BASE_POLICY]))


def test_weights_of_another_model_are_refused(vllm_plain):
    weights = list(named_weights(small_model(), None, [BASE_POLICY]))
    faults = {
        "1 are missing": weights[:-1],
        "no such tensor": [("base", "model.extra", weights[0][2])],
        r"\(1, 128\), expected": [("base", weights[0][1], weights[0][2][:1])],
        "float64": [("base", name, tensor.double()) for _, name, tensor in weights],
    }
    for message, faulty in faults.items():
        with pytest.raises(CheckpointError, match=message):
            vllm_plain.load(version=1, weights=faulty)
    vllm_plain.load(version=0, weights=weights)
    requests = asked(count=2)
    assert_logprobs_are(small_model().double(), requests, vllm_plain.generate(requests))


def test_nothing_is_copied_without_weights(vllm_plain):
    assert vllm_plain.load(version=4) == ""
    assert vllm_plain.generate(asked(count=1))[0].policy_version == 4


def test_diverged_weights_end_as_an_error_with_the_tokens_before(vllm_plain):
    weights = list(named_weights(small_model(), None, [BASE_POLICY]))
    broken = [(policy, name, tensor * math.nan if "norm" in name else tensor) for policy, name, tensor in weights]
    vllm_plain.load(version=1, weights=broken)
    (completion,) = vllm_plain.generate(asked(count=1))
    assert (completion.finish, completion.token_ids, completion.logprobs) == ("error", (), ())
    assert completion.error == "logits are not finite after 0 tokens: model diverged"
    vllm_plain.load(version=0, weights=weights)
    requests = asked()
    assert_logprobs_are(small_model().double(), requests, vllm_plain.generate(requests))
