"""Requests and completions as bytes: a JSON header, then token ids and log-probs as flat arrays. No pickle.

Layout: MAGIC, length of the header (uint32, little endian), header, int32 tokens that prompts add to the prompt before them,
int32 tokens of the completions, float64 log-probs of the completions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter

from mas_hpc.errors import RolloutError
from mas_hpc.rollout.engine import Completion, Request, SamplingParams
from mas_hpc.types import Finish, Span

MAGIC = b"mas1"
_PREFIX = struct.Struct("<4sI")
_TOKEN, _LOGPROB = np.dtype("<i4"), np.dtype("<f8")
_Count = Annotated[int, Field(ge=0)]
_Key = tuple[tuple[int, ...], tuple[Span, ...]]  # token ids of a prompt, and who wrote them
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message between the engines of two ranks; an empty one is a sign of life.

    Example: Frame(epoch=1, load=12, requests=((0, request),))
    """

    epoch: int
    """How often the sender has loaded weights."""
    load: int
    """Requests that the sender's own engine has outstanding, without those of the receiver."""
    finished: int = 0
    """How often the sender has come to the end of its own work."""
    cancels: bool = False
    """The receiver forgets every earlier request of the sender."""
    requests: tuple[tuple[int, Request], ...] = ()
    """By the sender's numbers."""
    completions: tuple[tuple[int, Completion], ...] = ()
    """By the receiver's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A prompt after the one before it: the tokens that both begin with are not sent again."""

    shared: _Count
    added: _Count
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    number: _Count
    length: _Count
    text: str
    finish: Finish
    error: str
    policy_version: int
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    epoch: _Count
    load: _Count
    finished: _Count
    cancels: bool
    policies: tuple[str, ...] = ()
    sampling: tuple[SamplingParams, ...] = ()
    prompts: tuple[_Prompt, ...] = ()
    requests: tuple[tuple[_Count, _Count, _Count, _Count, int], ...] = ()
    """Number, place in prompts, in policies and in sampling, seed."""
    answers: tuple[_Answer, ...] = ()


_HEADER = TypeAdapter(_Header)


def encode(frame: Frame) -> bytes:
    """The frame as bytes."""
    requests = [request for _, request in frame.requests]
    completions = [completion for _, completion in frame.completions]
    prompts, tokens = _pack_prompts({(request.prompt_ids, request.prompt_spans) for request in requests})
    policies = _places(request.policy for request in requests)
    sampling = _places(request.sampling for request in requests)
    header = _Header(
        epoch=frame.epoch, load=frame.load, finished=frame.finished, cancels=frame.cancels,
        policies=tuple(policies), sampling=tuple(sampling),
        prompts=tuple(entry for entry, _ in prompts.values()),
        requests=tuple(
            (number, prompts[request.prompt_ids, request.prompt_spans][1], policies[request.policy],
             sampling[request.sampling], request.seed)
            for number, request in frame.requests
        ),
        answers=tuple(_pack_answer(number, completion) for number, completion in frame.completions),
    )  # fmt: skip
    text = _HEADER.dump_json(header)
    parts = [
        _PREFIX.pack(MAGIC, len(text)), text, np.array(tokens, _TOKEN).tobytes(),
        np.array([token for completion in completions for token in completion.token_ids], _TOKEN).tobytes(),
        np.array([logprob for completion in completions for logprob in completion.logprobs], _LOGPROB).tobytes(),
    ]  # fmt: skip
    return b"".join(parts)


def decode(payload: bytes, source: int) -> Frame:
    """What `encode` was given. Raises RolloutError, naming the rank that sent it, for anything else."""
    try:
        magic, length = _PREFIX.unpack_from(payload)
        if magic != MAGIC:
            raise ValueError(f"begins with {magic!r}, expected {MAGIC!r}")
        header = _HEADER.validate_json(payload[_PREFIX.size : _PREFIX.size + length])
        num_prompt = sum(prompt.added for prompt in header.prompts)
        num_answer = sum(answer.length for answer in header.answers)
        body = memoryview(payload)[_PREFIX.size + length :]
        wanted = (num_prompt + num_answer) * _TOKEN.itemsize + num_answer * _LOGPROB.itemsize
        if len(body) != wanted:
            raise ValueError(f"{len(body)} bytes of arrays, expected {wanted}")
        tokens = np.frombuffer(body, _TOKEN, num_prompt + num_answer).tolist()
        logprobs = np.frombuffer(body, _LOGPROB, num_answer, (num_prompt + num_answer) * _TOKEN.itemsize).tolist()
        return Frame(
            epoch=header.epoch, load=header.load, finished=header.finished, cancels=header.cancels,
            requests=tuple(_requests(header, tokens[:num_prompt])),
            completions=tuple(_completions(header.answers, tokens[num_prompt:], logprobs)),
        )  # fmt: skip
    except (struct.error, ValueError, IndexError) as error:
        raise RolloutError(
            f"rank {source} sent a message that this rank cannot read ({error}); all ranks must run the same version of mas_hpc"
        ) from error


def _pack_prompts(keys: Iterable[_Key]) -> tuple[dict[_Key, tuple[_Prompt, int]], list[int]]:
    """In an order that puts common prefixes side by side: each prompt with its place, and the tokens that they add."""
    packed: dict[_Key, tuple[_Prompt, int]] = {}
    tokens: list[int] = []
    before: tuple[int, ...] = ()
    for place, (ids, spans) in enumerate(sorted(keys)):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        packed[ids, spans] = _Prompt(shared=shared, added=len(ids) - shared, spans=spans), place
        tokens += ids[shared:]
        before = ids
    return packed, tokens


def _places(values: Iterable[_Value]) -> dict[_Value, int]:
    """Distinct values with their places."""
    return {value: place for place, value in enumerate(dict.fromkeys(values))}


def _pack_answer(number: int, completion: Completion) -> _Answer:
    assert len(completion.token_ids) == len(completion.logprobs), "a log-prob a token"
    return _Answer(
        number=number, length=len(completion.token_ids), text=completion.text, finish=completion.finish,
        error=completion.error, policy_version=completion.policy_version, wall_s=completion.wall_s,
    )  # fmt: skip


def _requests(header: _Header, tokens: Sequence[int]) -> Iterator[tuple[int, Request]]:
    prompts: list[_Key] = []
    before: tuple[int, ...] = ()
    start = 0
    for entry in header.prompts:
        if entry.shared > len(before):
            raise ValueError(f"a prompt shares {entry.shared} tokens with one of {len(before)}")
        before = (*before[: entry.shared], *tokens[start : start + entry.added])
        prompts.append((before, entry.spans))
        start += entry.added
    for number, prompt, policy, sampling, seed in header.requests:
        ids, spans = prompts[prompt]
        yield (
            number,
            Request(
                prompt_ids=ids,
                prompt_spans=spans,
                policy=header.policies[policy],
                seed=seed,
                sampling=header.sampling[sampling],
            ),
        )


def _completions(
    answers: Sequence[_Answer], tokens: Sequence[int], logprobs: Sequence[float]
) -> Iterator[tuple[int, Completion]]:
    start = 0
    for answer in answers:
        part = slice(start, start + answer.length)
        start += answer.length
        yield answer.number, Completion(
            token_ids=tuple(tokens[part]), logprobs=tuple(logprobs[part]), text=answer.text, finish=answer.finish,
            error=answer.error, policy_version=answer.policy_version, wall_s=answer.wall_s,
        )  # fmt: skip
