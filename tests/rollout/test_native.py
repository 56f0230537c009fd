import copy
import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from mas_hpc.errors import RolloutError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Completion, Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine

from .conftest import build

EXACT = 1e-10


def ask(prompt, seed=0, policy="shared", spans=None, max_new_tokens=8, **sampling) -> Request:
    return Request(
        prompt_ids=tuple(prompt), prompt_spans=spans or (("", len(prompt)),), policy=policy, seed=seed,
        sampling=SamplingParams(max_new_tokens=max_new_tokens, **sampling),
    )  # fmt: skip


def prompts(count: int, low=1, high=20, seed=0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 32) for _ in range(draw.randint(low, high))] for _ in range(count)]


def plain_logprobs(model: PreTrainedModel, request: Request, completion: Completion, temperature=1.0) -> list[float]:
    """Log-probs of the completion by one forward of the library over prompt and completion."""
    ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0].tolist()


def assert_same(first: list[Completion], second: list[Completion], tolerance=EXACT) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish == other.finish
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return prepare(build("llama"))


def test_greedy_tokens_are_those_of_generate(library_model, tokenizer):
    requests = [ask(prompt, temperature=0, max_new_tokens=12) for prompt in prompts(5)]
    expected = [
        library_model.generate(torch.tensor([r.prompt_ids]), do_sample=False, max_new_tokens=12)[0, len(r.prompt_ids) :]
        for r in requests
    ]
    plain = copy.deepcopy(library_model)
    completions = NativeEngine(prepare(library_model), tokenizer, max_rows=3).generate(requests)
    for request, completion, tokens in zip(requests, completions, expected, strict=True):
        assert list(completion.token_ids) == tokens.tolist()
        assert completion.logprobs == pytest.approx(plain_logprobs(plain, request, completion), abs=EXACT)


def test_logprobs_of_samples_are_those_of_a_plain_forward(library_model, tokenizer):
    plain = copy.deepcopy(library_model)
    # float32 rotary tables are the same function of position on both sides, so float64 agrees to the last digits.
    requests = [ask(p, seed=k, temperature=0.7, max_new_tokens=40) for p in prompts(6) for k in range(3)]
    completions = NativeEngine(prepare(library_model), tokenizer, max_rows=7).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        expected = plain_logprobs(plain, request, completion, temperature=0.7)
        assert completion.logprobs == pytest.approx(expected, abs=EXACT)
        assert completion.finish == "length"


@pytest.mark.parametrize("max_rows", [1, 2, 7, 64])
def test_a_request_gives_the_same_whatever_else_is_in_the_batch(tokenizer, max_rows):
    model = prepare(build("llama").float())
    draw = random.Random(3)
    others = [
        ask(p, seed=draw.randrange(99), max_new_tokens=draw.randint(1, 30), temperature=draw.choice([0, 0.5, 1.3]))
        for p in prompts(15, seed=2)
        for _ in range(2)
    ]
    mine = ask(prompts(1, seed=9)[0], seed=5, max_new_tokens=30, stop_ids=(3,))
    alone = NativeEngine(model, tokenizer).generate([mine])
    among = NativeEngine(model, tokenizer, max_rows=max_rows).generate([*others[:11], mine, *others[11:]])
    assert_same(alone, among[11:12], tolerance=1e-5)


def test_refill_with_wildly_different_lengths_loses_and_reorders_nothing(llama, tokenizer):
    requests = [
        ask(p, seed=k, max_new_tokens=1 + 3 * ((i * 5 + k) % 13), stop_ids=(4, 9))
        for i, p in enumerate(prompts(9, high=30))
        for k in range(4)
    ]
    random.Random(0).shuffle(requests)
    engine = NativeEngine(llama, tokenizer, max_rows=8)
    together = engine.generate(requests)
    assert_same(together, [NativeEngine(llama, tokenizer).generate([request])[0] for request in requests])
    assert len({len(completion.token_ids) for completion in together}) > 8
    assert {completion.finish for completion in together} == {"stop", "length"}
    assert engine.stats.row_steps <= 8 * engine.stats.steps


def test_samples_of_one_prompt_are_prefilled_once(llama, tokenizer):
    (prompt,) = prompts(1, low=20)
    engine = NativeEngine(llama, tokenizer, max_rows=5)
    engine.generate([ask(prompt, seed=seed) for seed in range(16)])
    assert engine.stats.prompt_tokens == 16 * 20
    assert engine.stats.prefilled_tokens == 20
    assert engine.stats.decoded_tokens == 16 * 8


def test_a_common_prefix_of_different_prompts_is_prefilled_once(llama, tokenizer):
    requests = [ask([1, 2, 3, 4, last]) for last in (5, 6)] + [ask([1, 2])]
    engine = NativeEngine(llama, tokenizer)
    together = engine.generate(requests)
    assert engine.stats.prefilled_tokens == 4 + 2
    assert_same(together, [NativeEngine(llama, tokenizer).generate([request])[0] for request in requests])


def test_a_stop_id_ends_the_completion_and_is_part_of_it(llama, tokenizer):
    free = NativeEngine(llama, tokenizer).generate([ask([5, 6, 7], seed=1, max_new_tokens=30)])[0]
    stop = free.token_ids[10]
    (stopped,) = NativeEngine(llama, tokenizer).generate([ask([5, 6, 7], seed=1, max_new_tokens=30, stop_ids=(stop,))])
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert stopped.finish == "stop"


def test_a_stop_string_ends_the_completion_with_the_token_that_completes_it(llama, tokenizer):
    request = {"prompt": [5, 6, 7], "seed": 2, "max_new_tokens": 30}
    free = NativeEngine(llama, tokenizer).generate([ask(**request)])[0]
    word = tokenizer.decode(free.token_ids[12:15])
    (stopped,) = NativeEngine(llama, tokenizer).generate([ask(**request, stop_strings=("#never", word))])
    assert stopped.text == free.text[: free.text.index(word) + len(word)]
    assert stopped.finish == "stop"
    assert stopped.logprobs == pytest.approx(free.logprobs[: len(stopped.token_ids)], abs=EXACT)


def test_a_request_beyond_the_context_is_an_error_value_and_others_go_on(llama, tokenizer):
    fits, too_long = ask([1] * 120, max_new_tokens=8), ask([1] * 120, max_new_tokens=9)
    completions = NativeEngine(llama, tokenizer).generate([too_long, fits, ask([])])
    assert [completion.finish for completion in completions] == ["error", "length", "error"]
    assert "129" in completions[0].error and "128" in completions[0].error
    assert "empty" in completions[2].error
    assert completions[0].token_ids == ()


def test_a_finished_row_that_waits_to_be_dropped_stays_inside_the_position_table(tokenizer):
    model = prepare(build("gpt2"))
    requests = [ask([1] * 126, seed=seed, max_new_tokens=2) for seed in range(2)]
    requests += [ask([seed, 2], seed=seed, max_new_tokens=60) for seed in range(1, 23)]
    completions = NativeEngine(model, tokenizer).generate(requests)
    assert {completion.finish for completion in completions} == {"length"}


def test_logits_that_are_not_finite_are_an_error_value(tokenizer):
    model = prepare(build("llama"))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    (completion,) = NativeEngine(model, tokenizer).generate([ask([1, 2])])
    assert completion.finish == "error"
    assert "not finite" in completion.error


def test_weights_are_read_live_and_stay_trainable_and_the_mode_is_kept(tokenizer):
    model = prepare(build("llama"))
    model.train()
    engine = NativeEngine(model, tokenizer)
    before = engine.generate([ask([1, 2, 3], seed=4)])
    assert model.training
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    engine.load(version=7)
    after = engine.generate([ask([1, 2, 3], seed=4)])
    assert before[0].logprobs != after[0].logprobs
    assert (before[0].policy_version, after[0].policy_version) == (0, 7)


def with_adapters(seed=0) -> tuple[PreTrainedModel, AdapterBank, dict[str, PreTrainedModel]]:
    """A model with adapters of solver and critic, and for each a plain model with the adapter in its weights."""
    merged = {policy: build("llama") for policy in ("solver", "critic")}
    model = build("llama")
    kinds = ["q_proj", "v_proj", "down_proj"]
    bank = AdapterBank.install(model, list(merged), rank=2, alpha=4.0, target_modules=kinds, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for policy, plain in merged.items():
        tensors = {
            name: 0.3 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
            for name, tensor in bank.tensors(policy).items()
        }
        bank.assign(policy, tensors)
        for name, tensor in tensors.items():
            if "lora_A" in name:
                delta = tensors[name.replace("lora_A", "lora_B")] @ tensor * (4.0 / 2)
                plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight.data += delta
    return prepare(model), bank, merged


def test_sequence_scope_gives_what_merged_weights_give(tokenizer):
    model, bank, merged = with_adapters()
    requests = [ask(p, seed=i, policy=q, max_new_tokens=20) for i, p in enumerate(prompts(4)) for q in merged]
    engine = NativeEngine(model, tokenizer, bank=bank, scope="sequence", max_rows=5)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        expected = plain_logprobs(merged[request.policy], request, completion)
        assert completion.logprobs == pytest.approx(expected, abs=1e-9)


def test_speaker_scope_adapts_each_token_by_who_wrote_it_and_shares_prompts_between_policies(tokenizer):
    model, bank, _ = with_adapters()
    prompt, spans = prompts(1, low=20)[0], (("", 8), ("solver", 7), ("", 5))
    requests = [
        ask(prompt, seed=i, policy=policy, spans=spans, max_new_tokens=20) for i in range(3) for policy in bank.policies
    ]
    engine = NativeEngine(model, tokenizer, bank=bank, scope="speaker", max_rows=4)
    completions = engine.generate(requests)
    assert engine.stats.prefilled_tokens == 20
    for request, completion in zip(requests, completions, strict=True):
        assert completion.logprobs == pytest.approx(_routed_logprobs(model, bank, request, completion), abs=EXACT)


def _routed_logprobs(model: PreTrainedModel, bank: AdapterBank, request: Request, completion: Completion) -> list[float]:
    """One forward over the whole row with plain causal attention, each token routed by hand."""
    names = [name for name, count in (*request.prompt_spans, (request.policy, len(completion.token_ids))) for _ in range(count)]
    ids = torch.tensor([*request.prompt_ids, *completion.token_ids])

    def causal(layer, query, key, value, scaling):
        options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], **options)[0].transpose(
            0, 1
        )

    with torch.no_grad(), bank.route(torch.tensor([bank.index.get(name, -1) for name in names])):
        logits = model(ids[None], attend=causal, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[len(request.prompt_ids) :, None])[:, 0].tolist()


@pytest.mark.parametrize("spans", [None, (("", 1), ("judge", 1))])
def test_a_policy_without_adapter_is_refused_by_name(tokenizer, spans):
    model, bank, _ = with_adapters()
    model.train()
    engine = NativeEngine(model, tokenizer, bank=bank, scope="speaker")
    with pytest.raises(RolloutError, match=r"'judge'.*\['critic', 'solver'\]"):
        engine.generate([ask([1, 2], policy="solver" if spans else "judge", spans=spans)])
    assert model.training, "nothing was begun"


def test_what_another_model_wrote_is_read_by_the_base_as_in_training(tokenizer):
    model, bank, _ = with_adapters()
    engine = NativeEngine(model, tokenizer, bank=bank, scope="speaker", other_models=("judge",))
    request = ask([1, 2, 3], policy="solver", spans=(("", 1), ("judge", 2)))
    expected = NativeEngine(model, tokenizer, bank=bank, scope="speaker").generate([replace(request, prompt_spans=(("", 3),))])
    assert_same(engine.generate([request]), expected)
    with pytest.raises(RolloutError, match="'judge'"):
        engine.generate([replace(request, policy="judge")])
