"""What every engine promises, over all implementations."""

import pytest

from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.scripted import ScriptedEngine

from .conftest import build


@pytest.fixture(params=["native", "scripted"])
def engine(request, tokenizer) -> RolloutEngine:
    if request.param == "native":
        return NativeEngine(prepare(build("llama")), tokenizer, max_rows=4)
    return ScriptedEngine(lambda asked: "ab" * (asked.seed % 7), tokenizer)


def requests(**sampling) -> list[Request]:
    params = SamplingParams(max_new_tokens=6, stop_ids=(0,), **sampling)
    spans = (("", 2),)
    return [Request(prompt_ids=(1, i), prompt_spans=spans, policy="shared", seed=i, sampling=params) for i in range(1, 9)]


def test_one_completion_a_request_in_order(engine):
    asked = requests()
    together = engine.generate(asked)
    assert [completion.token_ids for completion in together] == [engine.generate([one])[0].token_ids for one in asked]


def test_no_request_gives_no_completion(engine):
    assert engine.generate([]) == []


def test_every_token_has_a_logprob_and_no_completion_is_too_long(engine):
    for completion in engine.generate(requests()):
        assert len(completion.logprobs) == len(completion.token_ids) <= 6
        assert all(logprob <= 0 for logprob in completion.logprobs)


def test_finish_tells_how_it_ended_and_text_has_no_special_tokens(engine, tokenizer):
    for completion in engine.generate(requests()):
        assert completion.finish == ("stop" if completion.token_ids[-1] == 0 else "length")
        assert completion.text == tokenizer.decode([token for token in completion.token_ids if token])


def test_completions_carry_the_version_that_was_loaded(engine):
    engine.load(version=3)
    assert {completion.policy_version for completion in engine.generate(requests())} == {3}


def test_a_scripted_completion_is_passed_on(tokenizer):
    answer = Completion(token_ids=(), logprobs=(), text="", finish="error", error="out of memory")
    assert ScriptedEngine(lambda _: answer, tokenizer).generate(requests()[:1]) == [answer]
