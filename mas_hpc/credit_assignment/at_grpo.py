"""AT-GRPO (arXiv 2510.11062, section 4.1): K siblings of one state are the group; each agent's turn is judged on its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import fmean

from mas_hpc.credit_assignment.group_relative import SCALES, GroupAdvantage, group_relative
from mas_hpc.types import Trace, Turn

GroupKey = tuple[int, str, int]  # (trace number, agent, turn index)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """What is not in the traces. Weights apply to advantages: inside one state, standardising erases reward scales."""

    group_size: int
    advantage: GroupAdvantage = "group"
    agent_weights: Mapping[str, float]
    balance_verdicts: float = 0.0
    penalties: bool = True
    """Whether a negative reward is a penalty; False where a reward model gives any sign, so that the scale says nothing."""


def at_grpo(traces: Sequence[Trace], settings: GroupSettings) -> list[Trace]:
    """Return the traces with `credit` on every turn of a whole group; groups with a failed member get none.

    Asserts the invariants of the group: K members, the same prompt ids, and committed text read by later turns.
    """
    groups = group_turns(traces)
    whole = {key: group for key, group in groups.items() if all(turn.reward is not None for turn in group)}
    for key, group in groups.items():
        _check(key, group, traces[key[0]], settings.group_size)
    turns = [turn for group in whole.values() for turn in group]
    keys = [key for key, group in whole.items() for _ in group]
    baseline, scale = SCALES[settings.advantage]
    advantages = group_relative([turn.reward for turn in turns], keys, baseline=baseline, scale=scale)
    balance = verdict_weights(turns, limit=settings.balance_verdicts)
    scaled = settings.penalties and scale == "group"
    penalty = {key: penalty_weight(group) if scaled else 1.0 for key, group in whole.items()}
    credit = {
        (key[0], turn.id): advantage
        * settings.agent_weights.get(turn.agent, 1.0)
        * balance.get((turn.agent, turn.truth), 1.0)
        * penalty[key]
        for key, turn, advantage in zip(keys, turns, advantages, strict=True)
    }
    return [
        replace(trace, turns=tuple(replace(turn, credit=credit.get((number, turn.id))) for turn in trace.turns))
        for number, trace in enumerate(traces)
    ]


def group_turns(traces: Sequence[Trace]) -> dict[GroupKey, list[Turn]]:
    """Siblings by (trace, agent, turn index); counterfactual turns belong to no group."""
    groups: dict[GroupKey, list[Turn]] = defaultdict(list)
    for number, trace in enumerate(traces):
        for turn in trace.turns:
            if not turn.counterfactual:
                groups[number, turn.agent, turn.index].append(turn)
    return groups


def verdict_weights(turns: Sequence[Turn], *, limit: float) -> dict[tuple[str, bool | None], float]:
    """Weight of each (agent, truth) for verdict turns: 0.5 / share of the class among the agent's turns, at most `limit`.

    Empty when limit is 0. Both classes then pull equally, however rare wrong answers become during training.
    """
    judged = Counter((turn.agent, turn.truth) for turn in turns if turn.verdict is not None)
    total = Counter(turn.agent for turn in turns if turn.verdict is not None)
    return {key: min(limit, 0.5 * total[key[0]] / count) for key, count in judged.items()} if limit else {}


def penalty_weight(group: Sequence[Turn]) -> float:
    """1 + the largest penalty among the members: the scale of negative rewards, which standardising has erased."""
    return 1.0 - min(0.0, *(turn.local_reward or 0.0 for turn in group))


def group_metrics(traces: Sequence[Trace]) -> dict[str, float]:
    """Per agent: failed share, mean reward, share of groups without variance, verdict balance (unreadable is wrong)."""
    metrics: dict[str, float] = {}
    by_agent: dict[str, list[list[Turn]]] = defaultdict(list)
    asked: dict[str, list[int]] = defaultdict(list)
    for key, group in group_turns(traces).items():
        asked[key[1]].append(len(group))
        by_agent[key[1]].append([turn for turn in group if turn.reward is not None])
    for agent, groups in by_agent.items():
        scored = [turn for group in groups for turn in group]
        metrics[f"failed/{agent}"] = 1.0 - len(scored) / sum(asked[agent])
        if not scored:
            continue
        metrics[f"reward/{agent}"] = fmean(turn.reward or 0.0 for turn in scored)
        metrics[f"degenerate/{agent}"] = fmean(len({turn.reward for turn in group}) < 2 for group in groups)
        recalls = [
            fmean(turn.verdict == truth for turn in scored if turn.truth == truth)
            for truth in (True, False)
            if any(turn.truth == truth for turn in scored)
        ]
        if any(turn.verdict is not None for turn in scored) and len(recalls) == 2:
            metrics[f"balanced_accuracy/{agent}"] = fmean(recalls)
    return metrics


def _check(key: GroupKey, group: Sequence[Turn], trace: Trace, group_size: int) -> None:
    where = f"group {key} of {trace.task.id}"
    assert len(group) == group_size, f"{where}: {len(group)} members, expected {group_size}"
    assert len({(turn.prompt_ids, turn.parent) for turn in group}) == 1, f"{where}: its members start from different states"
    committed = {turn.id: turn.completion_ids for turn in trace.path}
    assert group[0].parent is None or group[0].parent in committed, f"{where}: continues a turn that is not committed"
    known = {*committed.values(), *(ids[:-1] for ids in committed.values())}  # references leave the end token out
    assert known.issuperset(_completions_in_prompt(group[0])), f"{where}: reads text that was not committed"


def _completions_in_prompt(turn: Turn) -> list[tuple[int, ...]]:
    ends = [0, *accumulate(length for _, length in turn.prompt_spans)]
    return [
        turn.prompt_ids[start:end]
        for (policy, _), (start, end) in zip(turn.prompt_spans, pairwise(ends), strict=True)
        if policy
    ]
