"""What every engine promises, over all implementations."""

from collections.abc import Callable

import pytest

from mas_hpc.errors import RolloutError
from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.scripted import ScriptedEngine

from .conftest import build, small_bank, small_model


@pytest.fixture(params=["native", "vllm", "scripted"])
def engine(request, tokenizer) -> RolloutEngine:
    if request.param == "native":
        return NativeEngine(prepare(build("llama")), tokenizer, max_rows=4)
    if request.param == "vllm":
        return request.getfixturevalue("vllm_plain")
    return ScriptedEngine(lambda asked: "ab" * (asked.seed % 7), tokenizer)


@pytest.fixture(params=["native", "vllm"])
def adapted(request, tokenizer) -> RolloutEngine:
    """An engine that runs a model, with adapters of solver and critic; its context is 128 tokens."""
    if request.param == "vllm":
        return request.getfixturevalue("vllm_adapted")
    model = small_model()
    return NativeEngine(prepare(model), tokenizer, bank=small_bank(model), max_rows=4)


def requests(policy: str = "shared", prompt: Callable[[int], tuple[int, ...]] = lambda i: (1, i), **sampling) -> list[Request]:
    params = SamplingParams(**({"max_new_tokens": 6, "stop_ids": (0,)} | sampling))
    return [
        Request(prompt_ids=prompt(i), prompt_spans=(("", len(prompt(i))),), policy=policy, seed=i, sampling=params)
        for i in range(1, 9)
    ]


def test_one_completion_a_request_in_order(engine):
    asked = requests()
    together = engine.generate(asked)
    assert [completion.token_ids for completion in together] == [engine.generate([one])[0].token_ids for one in asked]


def test_no_request_gives_no_completion(engine):
    assert engine.generate([]) == []
    assert engine.submit([]) == [] == engine.poll()


def test_requests_are_numbered_as_they_come_and_each_ends_once(engine):
    numbers = engine.submit(requests()[:5])
    numbers += engine.submit(requests()[5:])
    ended: list[int] = []
    while len(ended) < len(numbers):
        ended += [number for number, _ in engine.poll()]
    assert sorted(ended) == sorted(set(numbers)) and numbers == sorted(numbers)
    assert engine.poll() == []


def test_nothing_is_left_of_what_was_cancelled(engine):
    engine.submit(requests(max_new_tokens=40))
    engine.poll()
    engine.cancel()
    assert engine.poll() == []
    (number,) = engine.submit(requests()[:1])
    ended = []
    while not ended:
        ended = engine.poll()
    assert ended == [(number, ended[0][1])]


def test_every_token_has_a_logprob_and_no_completion_is_too_long(engine):
    for completion in engine.generate(requests()):
        assert len(completion.logprobs) == len(completion.token_ids) <= 6
        assert all(logprob <= 0 for logprob in completion.logprobs)


def test_finish_tells_how_it_ended_and_text_has_no_special_tokens(engine, tokenizer):
    for completion in engine.generate(requests()):
        assert completion.finish == ("stop" if completion.token_ids[-1] == 0 else "length")
        assert completion.text == tokenizer.decode([token for token in completion.token_ids if token])


def test_completions_carry_the_version_that_was_loaded(engine):
    assert engine.load(version=3) == ""
    assert {completion.policy_version for completion in engine.generate(requests())} == {3}


def test_requests_and_their_prompts_are_counted(engine):
    before = engine.stats
    engine.generate(requests())
    done = engine.stats - before
    assert (done.requests, done.prompt_tokens) == (8, 16)


def test_a_scripted_completion_is_passed_on(tokenizer):
    answer = Completion(token_ids=(), logprobs=(), text="", finish="error", error="out of memory")
    assert ScriptedEngine(lambda _: answer, tokenizer).generate(requests()[:1]) == [answer]


# ---- engines that run a model


def test_a_policy_without_adapter_is_an_error_and_queues_nothing(adapted):
    known = requests("solver")[:1]
    with pytest.raises(RolloutError, match=r"policy 'judge': .* expected one of \['critic', 'solver'\]"):
        adapted.submit([*known, *requests("judge")])
    assert adapted.poll() == []
    assert len(adapted.generate(known)) == 1


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ((), "the prompt is empty: the first token is predicted from at least one; begin it with a bos token"),
        (
            (1,) * 123,
            "prompt of 123 tokens + max_new_tokens=6 is 129, beyond the model's context of 128; "
            "shorten the prompt or lower max_new_tokens",
        ),
    ],
)
def test_what_cannot_be_served_ends_as_an_error_beside_the_others(adapted, prompt, error):
    asked = requests("solver", prompt=lambda i: prompt if i == 2 else (1, i))
    completions = adapted.generate(asked)
    assert [completion.finish == "error" for completion in completions] == [i == 1 for i in range(8)]
    assert completions[1].error == error and completions[1].token_ids == ()


def test_a_prompt_may_fill_the_context(adapted):
    (completion,) = adapted.generate(requests("solver", prompt=lambda i: (1,) * 122, stop_ids=())[:1])
    assert (completion.finish, len(completion.token_ids)) == ("length", 6)


def test_the_stop_token_is_the_last_one_and_has_a_logprob(adapted):
    stops = tuple(range(20))
    stopped = adapted.generate(requests("solver", stop_ids=stops, max_new_tokens=40))
    for completion in stopped:
        assert completion.finish == "stop" and len(completion.logprobs) == len(completion.token_ids)
        assert [token in stops for token in completion.token_ids] == [False] * (len(completion.token_ids) - 1) + [True]
    assert max(len(completion.token_ids) for completion in stopped) > 1


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(adapted):
    free = adapted.generate(requests("solver", stop_ids=(), max_new_tokens=40))
    wanted = free[0].text[5:7]
    for completion, whole in zip(
        adapted.generate(requests("solver", stop_ids=(), stop_strings=(wanted, "??"), max_new_tokens=40)), free, strict=True
    ):
        end = whole.text.find(wanted) + len(wanted)
        assert completion.finish == ("stop" if wanted in whole.text else "length")
        assert completion.text == (whole.text[:end] if wanted in whole.text else whole.text)
        assert len(completion.logprobs) == len(completion.token_ids)


def test_a_completion_stops_where_its_limit_meets_a_stop_string(adapted):
    (whole,) = adapted.generate(requests("solver", stop_ids=(), max_new_tokens=4)[:1])
    assert 0 not in whole.token_ids
    (completion,) = adapted.generate(requests("solver", stop_ids=(), stop_strings=(whole.text[-1],), max_new_tokens=4)[:1])
    first = whole.text.index(whole.text[-1]) + 1
    assert (completion.text, completion.finish) == (whole.text[:first], "stop")


def test_greedy_logprobs_are_those_of_temperature_one(adapted):
    greedy = adapted.generate(requests("critic", temperature=0.0, top_p=0.3, top_k=2, max_new_tokens=1))
    drawn: dict[int, dict[int, float]] = {i: {} for i in range(8)}
    for shift in range(40):
        asked = [
            Request(
                prompt_ids=one.prompt_ids, prompt_spans=one.prompt_spans, policy=one.policy, seed=100 * shift + one.seed,
                sampling=one.sampling,
            )
            for one in requests("critic", max_new_tokens=1)
        ]  # fmt: skip
        for i, completion in enumerate(adapted.generate(asked)):
            drawn[i][completion.token_ids[0]] = completion.logprobs[0]
    compared = 0
    for i, completion in enumerate(greedy):
        if completion.token_ids[0] in drawn[i]:
            compared += 1
            assert completion.logprobs[0] == pytest.approx(drawn[i][completion.token_ids[0]], abs=1e-5)
        assert completion.logprobs[0] >= max(drawn[i].values()) - 1e-5
    assert compared >= 4


def test_the_seed_decides_what_is_sampled(adapted):
    asked = requests("solver", stop_ids=(), max_new_tokens=12)
    first, second = adapted.generate(asked), adapted.generate(asked)
    assert [completion.token_ids for completion in first] == [completion.token_ids for completion in second]
    assert len({completion.token_ids for completion in first}) == 8
