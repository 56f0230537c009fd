"""From credited turns to the trainer's samples, and the advantages of their tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mas_hpc.credit_assignment.gae import discounted_returns, gae
from mas_hpc.credit_assignment.group_relative import whiten
from mas_hpc.types import Sample, Trace

Floats = NDArray[np.float64]


def to_samples(traces: Iterable[Trace]) -> list[Sample]:
    """One sample a turn that has a credit and at least one token; samples of one question are one tree."""
    return [
        Sample(
            id=turn.id,
            tree=f"{trace.step}/{trace.task.id}",
            agent=turn.agent,
            policy=turn.policy,
            prompt_ids=turn.prompt_ids,
            prompt_spans=turn.prompt_spans,
            completion_ids=turn.completion_ids,
            behavior_logprobs=turn.behavior_logprobs,
            advantage=turn.credit,
        )
        for trace in traces
        for turn in trace.turns
        if turn.credit is not None and turn.completion_ids
    ]


def with_returns(
    samples: Sequence[Sample], trajectories: Sequence[Hashable], rewards: Sequence[Floats], *, gamma: float
) -> list[Sample]:
    """REINFORCE++ (arXiv 2501.03262): column `advantage`, the returns of the tokens, whitened over the whole batch.

    `trajectories` name each sample's trajectory, whose samples are its turns in order; `rewards` are one a token.
    """
    parts = [np.zeros(0)] * len(samples)
    for numbers in _members(trajectories).values():
        joined = np.concatenate([rewards[number] for number in numbers])
        _place(parts, numbers, rewards, discounted_returns(joined, np.ones(len(joined), dtype=bool), gamma))
    return _with_column(samples, "advantage", _whitened(parts))


def with_advantages(
    samples: Sequence[Sample], trajectories: Sequence[Hashable], rewards: Sequence[Floats],
    *, gamma: float, lam: float, whitened: bool,
) -> list[Sample]:  # fmt: skip
    """PPO: columns `advantage` (GAE) and `return` from the column `old_value`; arguments as in `with_returns`.

    The tokens between an agent's turns are not its own and are skipped. Returns are taken before whitening.
    """
    advantages, returns = [np.zeros(0)] * len(samples), [np.zeros(0)] * len(samples)
    for numbers in _members(trajectories).values():
        reward = np.concatenate([rewards[number] for number in numbers])
        value = np.concatenate([samples[number].columns["old_value"] for number in numbers])
        advantage, target = gae(reward, value, np.ones(len(reward), dtype=bool), gamma=gamma, lam=lam)
        _place(advantages, numbers, rewards, advantage)
        _place(returns, numbers, rewards, target)
    samples = _with_column(samples, "return", returns)
    return _with_column(samples, "advantage", _whitened(advantages) if whitened else advantages)


def _members(trajectories: Sequence[Hashable]) -> Mapping[Hashable, list[int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number, trajectory in enumerate(trajectories):
        members[trajectory].append(number)
    return members


def _place(parts: list[Floats], numbers: Sequence[int], like: Sequence[Floats], joined: Floats) -> None:
    ends = np.cumsum([len(like[number]) for number in numbers])[:-1]
    for number, part in zip(numbers, np.split(joined, ends), strict=True):
        parts[number] = part


def _whitened(parts: Sequence[Floats]) -> list[Floats]:
    if not parts:
        return []
    return np.split(whiten(np.concatenate(parts)), np.cumsum([len(part) for part in parts])[:-1])


def _with_column(samples: Sequence[Sample], name: str, parts: Sequence[Floats]) -> list[Sample]:
    return [
        replace(sample, columns={**sample.columns, name: tuple(part.tolist())})
        for sample, part in zip(samples, parts, strict=True)
    ]
