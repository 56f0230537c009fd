"""GRPO over whole episodes: what a turn earns, and what it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from mas_hpc.credit_assignment.group_relative import SCALES, GroupAdvantage, group_relative, informative, rae
from mas_hpc.types import Trace, Turn


def grpo(
    traces: Sequence[Trace], outcomes: Sequence[float | None], *, group_by: Literal["task", "agent"], 
    advantage: GroupAdvantage | Literal["reinforce_pp", "rae"],
    baselines: Mapping[str, float], decay: float,
) -> tuple[list[Trace], dict[str, float]]:  # fmt: skip
    """Return the traces with `credit` on the turns of their paths, and the agents' new moving averages (`rae` moves them).

    `outcomes` are the episodes' rewards, None for those that failed. group_by task: every turn of an episode earns its
    outcome and is compared with all episodes of the question (GRPO, arXiv 2402.03300, over a team as in MAGRPO,
    2508.04652); agent: a turn earns its own reward and is compared with the same agent's turns on the question, and gets 0
    where there is no other. reinforce_pp gives the reward itself, to be turned into returns of tokens. A failed turn has
    credit None.
    """
    members = [(number, turn) for number, trace in enumerate(traces) for turn in trace.path]
    rewards = [outcomes[number] if group_by == "task" else turn.reward for number, turn in members]
    if advantage == "reinforce_pp":
        credits: Sequence[float] = [reward or 0.0 for reward in rewards]
    elif advantage == "rae":
        credits, baselines = rae(rewards, [turn.agent for _, turn in members], baselines, decay=decay)
    elif group_by == "task":
        baseline, scale = SCALES[advantage]
        of_trace = group_relative(outcomes, [trace.task.id for trace in traces], baseline=baseline, scale=scale)
        credits = [of_trace[number] for number, _ in members]
    else:
        keys = [(traces[number].task.id, turn.agent) for number, turn in members]
        credits = _among_others(rewards, keys, advantage)
    by_turn: dict[Hashable, float | None] = {
        (number, turn.id): None if reward is None or turn.reward is None else credit
        for (number, turn), reward, credit in zip(members, rewards, credits, strict=True)
    }
    return [_credited(trace, number, by_turn) for number, trace in enumerate(traces)], dict(baselines)


def _among_others(rewards: Sequence[float | None], keys: Sequence[Hashable], advantage: GroupAdvantage) -> Sequence[float]:
    """Group-relative advantages; 0 for the only turn of its key, as where one episode alone went on to the agent."""
    baseline, scale = SCALES[advantage]
    sizes = Counter(keys)
    compared = [place for place, key in enumerate(keys) if sizes[key] > 1]
    found = group_relative(
        [rewards[place] for place in compared], [keys[place] for place in compared], baseline=baseline, scale=scale
    )
    by_place = dict(zip(compared, found, strict=True))
    return [by_place.get(place, 0.0) for place in range(len(keys))]


def _credited(trace: Trace, number: int, credit: Mapping[Hashable, float | None]) -> Trace:
    def of(turn: Turn) -> Turn:
        return replace(turn, credit=credit.get((number, turn.id)))

    return replace(trace, turns=tuple(of(turn) for turn in trace.turns))


def informative_tasks(traces: Sequence[Trace], outcomes: Sequence[float | None]) -> set[str]:
    """Questions whose episodes differ in outcome: those that dynamic sampling keeps (DAPO, arXiv 2503.14476)."""
    groups: dict[str, list[float | None]] = {trace.task.id: [] for trace in traces}
    for trace, outcome in zip(traces, outcomes, strict=True):
        groups[trace.task.id].append(outcome)
    return informative(groups)
