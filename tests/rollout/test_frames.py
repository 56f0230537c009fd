"""What one rank packs another unpacks, and anything else is an error that names the sender."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.errors import RolloutError
from mas_hpc.rollout.engine import Completion, Request, SamplingParams
from mas_hpc.rollout.frames import Frame, decode, encode

COUNTS = st.integers(0, 2**40)
TOKENS = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 2), max_size=12).map(tuple)
SECONDS = st.floats(0.0, 1e6)
SAMPLING = st.builds(
    SamplingParams, max_new_tokens=st.integers(1, 9), temperature=st.floats(0.0, 2.0), top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 50), stop_ids=TOKENS, stop_strings=st.lists(st.text(max_size=3), max_size=2).map(tuple),
)  # fmt: skip
SPANS = st.lists(st.tuples(st.text(max_size=4), st.integers(0, 99)), max_size=3).map(tuple)
REQUESTS = st.builds(
    Request, prompt_ids=TOKENS, prompt_spans=SPANS, policy=st.sampled_from(("solver", "critic")),
    seed=st.integers(-(2**63), 2**63 - 1), sampling=SAMPLING,
)  # fmt: skip


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    tokens = draw(TOKENS)
    logprobs = st.floats(max_value=0.0, allow_nan=False)
    return Completion(
        token_ids=tokens, logprobs=tuple(draw(st.lists(logprobs, min_size=len(tokens), max_size=len(tokens)))),
        text=draw(st.text(max_size=8)), finish=draw(st.sampled_from(("stop", "length", "error"))),
        error=draw(st.text(max_size=8)), policy_version=draw(COUNTS), wall_s=draw(SECONDS),
    )  # fmt: skip


FRAMES = st.builds(
    Frame, epoch=COUNTS, load=COUNTS, cancels=st.booleans(),
    requests=st.lists(st.tuples(COUNTS, REQUESTS), max_size=5).map(tuple),
    completions=st.lists(st.tuples(COUNTS, completions()), max_size=4).map(tuple),
)  # fmt: skip


@given(FRAMES)
def test_a_frame_comes_out_as_it_went_in(frame: Frame) -> None:
    assert decode(encode(frame), source=1) == frame


def request(*prompt_ids: int, seed: int = 0) -> Request:
    spans = (("", len(prompt_ids)),)
    return Request(
        prompt_ids=prompt_ids, prompt_spans=spans, policy="solver", seed=seed, sampling=SamplingParams(max_new_tokens=4)
    )


def frame_of(*requests: Request) -> Frame:
    return Frame(epoch=0, load=0, requests=tuple(enumerate(requests)))


def test_a_common_prefix_is_sent_once() -> None:
    long = tuple(range(1000))
    one = len(encode(frame_of(request(*long, 1))))
    siblings = len(encode(frame_of(*(request(*long, 1, seed=seed) for seed in range(8)))))
    branches = len(encode(frame_of(*(request(*long, last) for last in range(8)))))
    assert siblings - one < 7 * 40
    assert branches - one < 7 * 100


@pytest.mark.parametrize(
    "damage",
    [
        lambda payload: b"",
        lambda payload: b"GET / HTTP/1.1\r\n",
        lambda payload: payload[:-4],
        lambda payload: payload + b"\0" * 4,
        lambda payload: payload.replace(b'"epoch":0', b'"epoch":X'),
        lambda payload: payload.replace(b'"load":0', b'"load":-'),
        lambda payload: payload.replace(b'"shared":0', b'"shared":9'),
        lambda payload: payload.replace(b'"finish":"stop"', b'"finish":"stup"'),
        lambda payload: payload.replace(b"[[7,0,0,0,5]]", b"[[7,3,0,0,5]]"),
        lambda payload: payload.replace(b"[[7,0,0,0,5]]", b"[[7,0,0,1,5]]"),
    ],
)
def test_what_cannot_be_read_names_the_rank_that_sent_it(damage) -> None:
    answer = Completion(token_ids=(4, 2), logprobs=(-1.0, -2.0), text="a", finish="stop")
    payload = encode(Frame(epoch=0, load=0, requests=((7, request(1, 2, seed=5)),), completions=((0, answer),)))
    assert damage(payload) != payload
    with pytest.raises(RolloutError, match="rank 3 sent a message that this rank cannot read"):
        decode(damage(payload), source=3)
