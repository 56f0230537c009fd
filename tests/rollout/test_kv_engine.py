"""The native engine over many calls: what is shared between turns, dropped for room, and interrupted."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.native.engine import NativeEngine

from .conftest import build
from .test_native import ask, assert_same, plain_logprobs, prompts, with_adapters

TOKEN_BYTES = 3 * 2 * 2 * 8 * 8  # layers, key and value, heads, head dimension, float64


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return prepare(build("llama"))


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return build("llama")


def follow_up(request: Request, completion: Completion, cue: list[int], **options) -> Request:
    return ask([*request.prompt_ids, *completion.token_ids, *cue], **options)


def assert_plain(plain: PreTrainedModel, requests: list[Request], completions: list[Completion]) -> None:
    for request, completion in zip(requests, completions, strict=True):
        temperature = request.sampling.temperature or 1.0
        assert completion.finish != "error"
        assert completion.logprobs == pytest.approx(plain_logprobs(plain, request, completion, temperature), abs=1e-9)


def test_the_next_speaker_finds_the_transcript(llama, plain, tokenizer) -> None:
    engine = NativeEngine(llama, tokenizer)
    first = [ask(prompt, seed=seed) for prompt in prompts(3, low=15) for seed in range(2)]
    answers = engine.generate(first)
    before = engine.stats
    second = [follow_up(q, c, [1, 2, 3], seed=9) for q, c in zip(first, answers, strict=True)]
    assert_plain(plain, second, engine.generate(second))
    # The last sampled token was never fed, so it is run with the cue.
    assert (engine.stats - before).prefilled_tokens == len(second) * (1 + 3)


def test_siblings_of_a_later_turn_share_it(llama, plain, tokenizer) -> None:
    engine = NativeEngine(llama, tokenizer)
    (prompt,) = prompts(1, low=15)
    (answer,) = engine.generate([ask(prompt)])
    before = engine.stats
    siblings = [follow_up(ask(prompt), answer, [4], seed=seed) for seed in range(5)]
    assert_plain(plain, siblings, engine.generate(siblings))
    assert (engine.stats - before).prefilled_tokens == 2
    again = engine.stats
    assert_same(engine.generate(siblings[:1]), engine.generate(siblings[:1]))
    assert (engine.stats - again).prefilled_tokens == 2  # twice the hidden state of the last token


def test_in_speaker_scope_agents_share_one_transcript_and_in_sequence_scope_they_cannot(tokenizer) -> None:
    (prompt,) = prompts(1, low=15)
    prefilled = {}
    for scope in ("speaker", "sequence"):
        model, bank, _ = with_adapters()
        engine = NativeEngine(model, tokenizer, bank=bank, scope=scope)
        request = ask(prompt, policy="solver")
        (answer,) = engine.generate([request])
        before = engine.stats
        spans = (("", len(prompt)), ("solver", len(answer.token_ids)), ("", 2))
        later = ask([*prompt, *answer.token_ids, 5, 6], policy="critic", spans=spans)
        fresh = NativeEngine(model, tokenizer, bank=bank, scope=scope)
        assert_same(engine.generate([later]), fresh.generate([later]))
        prefilled[scope] = (engine.stats - before).prefilled_tokens
    assert prefilled == {"speaker": 3, "sequence": len(prompt) + 8 + 2}


def test_new_weights_are_never_read_with_old_keys(tokenizer) -> None:
    model = prepare(build("llama"))
    engine = NativeEngine(model, tokenizer)
    request = ask(prompts(1, low=15)[0], seed=3)
    engine.generate([request])
    for told in (True, False):  # an optimizer's step is noticed even where nobody calls load
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        if told:
            engine.load(version=1)
        assert_same(engine.generate([request]), NativeEngine(model, tokenizer).generate([request]))


def test_an_engine_that_slept_gives_the_same_and_has_given_its_memory_back(llama, tokenizer) -> None:
    engine = NativeEngine(llama, tokenizer)
    request = ask(prompts(1, low=15)[0], seed=3)
    before = engine.generate([request])
    assert engine._pool.num_bytes > 0
    engine.sleep()
    assert engine._pool.num_bytes == 0
    assert_same(engine.generate([request]), before)
    assert engine.stats.prefilled_tokens == 2 * len(request.prompt_ids)


def test_what_does_not_fit_is_evicted_and_run_again(llama, plain, tokenizer) -> None:
    requests = [ask(prompt, seed=1) for prompt in prompts(12, low=15)]
    engine = NativeEngine(llama, tokenizer, kv_bytes=150 * TOKEN_BYTES)
    for _ in range(2):
        assert_plain(plain, requests, engine.generate(requests))
    stats = engine.stats
    assert stats.evicted_tokens > 0
    assert stats.prefilled_tokens > sum(len(request.prompt_ids) for request in requests)


def test_rows_are_set_back_when_completions_outgrow_the_room_and_go_on_later(llama, plain, tokenizer) -> None:
    requests = [ask(prompt, seed=seed, max_new_tokens=80) for seed, prompt in enumerate(prompts(4, low=8, high=9))]
    engine = NativeEngine(llama, tokenizer, kv_bytes=200 * TOKEN_BYTES)
    roomy = NativeEngine(llama, tokenizer)
    assert_same(engine.generate(requests), roomy.generate(requests), tolerance=1e-9)
    assert engine.stats.prefilled_tokens > roomy.stats.prefilled_tokens


def test_a_request_that_cannot_fit_alone_is_an_error_value_that_names_the_knob(llama, tokenizer) -> None:
    long, short = ask([1] * 60), ask([2] * 5)
    completions = NativeEngine(llama, tokenizer, kv_bytes=100 * TOKEN_BYTES).generate([long, short])
    assert [completion.finish for completion in completions] == ["error", "length"]
    assert "rollout.kv_gib" in completions[0].error and "60 tokens" in completions[0].error


def test_what_fits_alone_is_served_however_many_wait_for_another_prompt(llama, tokenizer) -> None:
    """The third waits for the prompt of the first, so that prompt was pinned when the second had the engine to itself."""
    engine = NativeEngine(llama, tokenizer, kv_bytes=125 * TOKEN_BYTES)
    first, second = ask([1] * 40, max_new_tokens=20), ask([2] * 30, max_new_tokens=30)
    engine.submit([first, second])
    done = dict(engine.poll())
    engine.submit([ask([1] * 40, seed=2, max_new_tokens=2)])
    while len(done) < 3:
        done |= dict(engine.poll())
    assert [done[number].error for number in range(3)] == [""] * 3


def test_what_rows_decoded_is_kept_however_the_batch_is_laid_out_anew(llama, plain, tokenizer) -> None:
    """Rows that end while many others join leave the batch in the middle of a poll."""
    lengths = random.Random(1)
    engine = NativeEngine(llama, tokenizer, max_rows=32)
    first = [ask(prompt, seed=k, max_new_tokens=lengths.randint(2, 40)) for k, prompt in enumerate(prompts(60, low=10))]
    answers = engine.generate(first)
    before = engine.stats
    second = [follow_up(q, c, [1], max_new_tokens=1) for q, c in zip(first, answers, strict=True)]
    assert_plain(plain, second, engine.generate(second))
    assert (engine.stats - before).prefilled_tokens <= len(second) * (1 + 1)


def test_a_request_without_room_leaves_what_is_kept_for_later(llama, tokenizer) -> None:
    engine = NativeEngine(llama, tokenizer, kv_bytes=300 * TOKEN_BYTES)
    engine.generate([ask(prompt, max_new_tokens=8) for prompt in prompts(3, low=15, high=16)])
    engine.submit([ask([7] * 30, max_new_tokens=60)])
    engine.poll()
    engine.submit([ask([8] * 96, max_new_tokens=30)])
    engine.poll()
    assert engine.stats.evicted_tokens == 0


def test_a_completion_that_outgrows_the_whole_memory_is_an_error_value(llama, tokenizer) -> None:
    (completion,) = NativeEngine(llama, tokenizer, kv_bytes=80 * TOKEN_BYTES).generate([ask([1] * 10, max_new_tokens=100)])
    assert completion.finish == "error" and len(completion.token_ids) > 20 and "kv_gib" in completion.error


@pytest.mark.parametrize("seed", range(12))
def test_requests_that_come_at_any_time_get_what_a_plain_forward_gives(llama, plain, tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    engine = NativeEngine(
        llama, tokenizer, max_rows=draw.choice([1, 3, 8]), prefill_chunk=draw.choice([1, 5, 64]),
        kv_bytes=draw.choice([300, 1000, 10_000]) * TOKEN_BYTES,
    )  # fmt: skip
    stems, asked, done = prompts(4, high=30, seed=seed), {}, {}
    for _ in range(draw.randint(2, 5)):
        batch = [
            ask(
                draw.choice(stems)[:90] + [draw.randrange(1, 32) for _ in range(draw.randint(0, 6))], seed=draw.randrange(5),
                max_new_tokens=draw.randint(1, 20), temperature=draw.choice([0, 0.7, 1]), stop_ids=draw.choice([(), (3,)]),
            )
            for _ in range(draw.randint(0, 9))
        ]  # fmt: skip
        asked |= dict(zip(engine.submit(batch), batch, strict=True))
        for number, completion in [pair for _ in range(draw.randint(0, 4)) for pair in engine.poll()]:
            done[number] = completion
            stems.append([*asked[number].prompt_ids, *completion.token_ids])
    while len(done) < len(asked):
        done |= dict(engine.poll())
    assert_plain(plain, list(asked.values()), [done[number] for number in asked])
    alone = [NativeEngine(llama, tokenizer).generate([request])[0] for request in asked.values()]
    assert [one.token_ids for one in alone] == [done[number].token_ids for number in asked]


def test_after_cancelling_nothing_comes_and_the_engine_is_as_new(llama, tokenizer) -> None:
    llama.train()
    engine = NativeEngine(llama, tokenizer, max_rows=2)
    requests = [ask(prompt, seed=1, max_new_tokens=30) for prompt in prompts(5)]
    engine.submit(requests)
    engine.poll()
    assert not llama.training
    engine.cancel()
    assert llama.training and engine.poll() == []
    assert_same(engine.generate(requests), NativeEngine(llama, tokenizer).generate(requests))
    llama.eval()


def test_large_float32_weights_are_multiplied_in_another_layout_and_follow_updates(tokenizer) -> None:
    def wide() -> PreTrainedModel:
        torch.manual_seed(0)
        config = build("llama").config
        config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
        return type(build("llama"))(config).eval()

    model, plain = prepare(wide()), wide()
    engine = NativeEngine(model, tokenizer)
    requests = [ask(prompt, seed=1) for prompt in prompts(3)]
    for _ in range(2):
        for request, completion in zip(requests, engine.generate(requests), strict=True):
            assert completion.logprobs == pytest.approx(plain_logprobs(plain, request, completion), abs=1e-4)
        with torch.no_grad():
            for changed in (model, plain):
                changed.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert "forward" not in vars(model.model.layers[0].mlp.up_proj)  # as it was


def test_bfloat16_weights_give_the_log_probs_of_bfloat16(tokenizer) -> None:
    model, plain = prepare(build("llama").bfloat16()), build("llama").bfloat16()
    engine = NativeEngine(model, tokenizer, prefill_chunk=7)
    first = [ask(prompt, seed=seed) for prompt in prompts(2, low=15) for seed in range(2)]
    answers = engine.generate(first)
    second = [follow_up(q, c, [1, 2, 3], seed=9) for q, c in zip(first, answers, strict=True)]
    for request, completion in zip([*first, *second], [*answers, *engine.generate(second)], strict=True):
        assert completion.logprobs == pytest.approx(plain_logprobs(plain, request, completion), abs=0.25)


def test_one_long_completion_among_short_ones_does_not_make_the_tails_of_all_as_wide(llama, plain, tokenizer) -> None:
    budget = 600 * TOKEN_BYTES
    engine = NativeEngine(llama, tokenizer, max_rows=16, kv_bytes=budget)
    long = ask([1] * 5, max_new_tokens=100)
    requests = [long, *(ask([2, 3, k % 30 + 1], seed=k, max_new_tokens=3) for k in range(300))]
    assert_plain(plain, requests[:1], engine.generate(requests)[:1])
    assert engine.stats.peak_kv_bytes < 2 * budget
