"""From credited turns to the trainer's samples."""

from __future__ import annotations

from collections.abc import Iterable

from mas_hpc.types import Sample, Trace


def to_samples(traces: Iterable[Trace]) -> list[Sample]:
    """One sample a turn that has a non-zero credit and at least one token; the others carry no gradient."""
    return [
        Sample(
            id=turn.id,
            tree=f"{trace.step}/{number}",
            agent=turn.agent,
            policy=turn.policy,
            prompt_ids=turn.prompt_ids,
            prompt_spans=turn.prompt_spans,
            completion_ids=turn.completion_ids,
            behavior_logprobs=turn.behavior_logprobs,
            advantage=turn.credit,
        )
        for number, trace in enumerate(traces)
        for turn in trace.turns
        if turn.credit and turn.completion_ids
    ]


def num_group_tokens(traces: Iterable[Trace]) -> int:
    """Completion tokens of all group members, degenerate groups included: the denominator of the token mean."""
    return sum(len(turn.completion_ids) for trace in traces for turn in trace.turns if turn.credit is not None)
