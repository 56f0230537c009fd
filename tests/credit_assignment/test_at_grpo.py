"""AT-GRPO: the group key, its invariants, and weights that survive standardisation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mas_hpc.credit_assignment.assign import to_samples
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo, group_metrics, verdict_weights
from mas_hpc.types import Task, Trace, Turn

SETTINGS = GroupSettings(group_size=2, advantage="group_mean", agent_weights={})


def turn(name: str, index: int, sibling: int, reward: float | None, **fields) -> Turn:
    base = Turn(
        id=f"{index}-{name}-{sibling}",
        parent="0-solver-0" if index else None,
        task_id="q",
        agent=name,
        policy="shared",
        index=index,
        sibling=sibling,
        prompt_ids=(1, 2) if not index else (1, 2, 10, 3),
        completion_ids=(10 + sibling,),
        behavior_logprobs=(-1.0,),
        prompt_spans=(("", 2),) if not index else (("", 2), ("shared", 1), ("", 1)),
        text="",
        finish="stop",
        reward=reward,
    )
    return replace(base, **fields)


def trace(*turns: Turn) -> Trace:
    return Trace(task=Task(id="q", question="", answer=""), turns=turns)


def pair(name: str, index: int, rewards: tuple[float | None, float | None], **fields) -> list[Turn]:
    return [turn(name, index, 0, rewards[0], committed=True, **fields), turn(name, index, 1, rewards[1], **fields)]


def credits(traces: list[Trace], settings: GroupSettings = SETTINGS) -> list[float | None]:
    return [t.credit for item in at_grpo(traces, settings) for t in item.turns]


def test_groups_are_agent_and_turn_of_one_trace_never_whole_traces() -> None:
    # Pooling all turns of a trace (the study note's reading) would give solver +0.5 here and critic -0.5.
    item = trace(*pair("solver", 0, (1.0, 1.0)), *pair("critic", 1, (0.0, 1.0)))
    assert credits([item]) == [0.0, 0.0, -0.5, 0.5]


def test_two_traces_of_one_task_do_not_pool() -> None:
    first, second = trace(*pair("solver", 0, (1.0, 0.0))), trace(*pair("solver", 0, (1.0, 1.0)))
    assert credits([first, second]) == [0.5, -0.5, 0.0, 0.0]


def test_members_from_different_states_are_a_programming_error() -> None:
    broken = trace(turn("solver", 0, 0, 1.0, committed=True), turn("solver", 0, 1, 0.0, prompt_ids=(9, 9)))
    with pytest.raises(AssertionError, match="different states"):
        at_grpo([broken], SETTINGS)


def test_a_group_of_the_wrong_size_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="1 members, expected 2"):
        at_grpo([trace(turn("solver", 0, 0, 1.0, committed=True))], SETTINGS)


def test_later_roles_must_read_committed_text() -> None:
    uncommitted = pair("critic", 1, (0.0, 1.0), prompt_ids=(1, 2, 11, 3))  # token 11 is the sibling that was not committed
    with pytest.raises(AssertionError, match="reads text that was not committed"):
        at_grpo([trace(*pair("solver", 0, (1.0, 0.0)), *uncommitted)], SETTINGS)


def test_counterfactual_turns_are_outside_every_group() -> None:
    extra = turn("critic", 1, 0, 1.0, id="x", counterfactual=True, parent="0-solver-1")
    assert credits([trace(*pair("solver", 0, (1.0, 0.0)), extra)]) == [0.5, -0.5, None]


def test_a_group_with_a_failed_member_gets_no_credit() -> None:
    item = trace(*pair("solver", 0, (1.0, None)))
    assert credits([item]) == [None, None]
    assert to_samples(at_grpo([item], SETTINGS)) == []


def test_weights_apply_after_normalisation() -> None:
    settings = GroupSettings(group_size=2, advantage="group", agent_weights={"solver": 0.3})
    half = 0.3 * 0.5 / (0.5**0.5 + 1e-4)
    assert credits([trace(*pair("solver", 0, (1.0, 0.0)))], settings) == pytest.approx([half, -half])


def test_rare_truths_weigh_more_up_to_the_limit() -> None:
    turns = [turn("critic", 1, i, 1.0, verdict=True, truth=i > 0) for i in range(8)]
    assert verdict_weights(turns, limit=3.0) == {("critic", False): 3.0, ("critic", True): pytest.approx(4 / 7)}
    assert verdict_weights(turns, limit=0.0) == {}
    assert verdict_weights([turn("solver", 0, 0, 1.0, truth=True)], limit=3.0) == {}


def test_degenerate_groups_are_counted_per_agent_and_still_count_as_tokens() -> None:
    item = trace(*pair("solver", 0, (1.0, 1.0)), *pair("critic", 1, (0.0, 1.0), truth=True, verdict=True))
    metrics = group_metrics([item])
    assert (metrics["degenerate/solver"], metrics["degenerate/critic"]) == (1.0, 0.0)
    assert metrics["reward/critic"] == 0.5
    credited = at_grpo([item], SETTINGS)
    samples = to_samples(credited)
    assert [sample.agent for sample in samples if sample.advantage] == ["critic", "critic"]
    assert sum(len(sample.completion_ids) for sample in samples) == 4


def test_verdict_balance_is_the_mean_of_two_recalls() -> None:
    approve_all = [turn("critic", 1, i, 0.0, verdict=True, truth=i != 0, committed=i == 0) for i in range(4)]
    metrics = group_metrics([trace(*approve_all)])
    assert metrics["balanced_accuracy/critic"] == 0.5


def test_a_penalty_survives_standardisation() -> None:
    # 1 and 0 standardise to the same advantages as 1 and -0.5; the penalty comes back as a factor of 1.5
    broke = [turn("reviser", 0, i, r, local_reward=r, committed=i == 0) for i, r in enumerate((1.0, -0.5))]
    failed = [turn("reviser", 0, i, r, local_reward=r, committed=i == 0) for i, r in enumerate((1.0, 0.0))]
    settings = GroupSettings(group_size=2, advantage="group", agent_weights={})
    ratio = credits([trace(*broke)], settings)[0] / credits([trace(*failed)], settings)[0]
    assert ratio == pytest.approx(1.5, rel=1e-3)
    assert credits([trace(*broke)], SETTINGS) == [0.75, -0.75]  # mean-only advantages have it already


def test_failed_members_are_counted() -> None:
    assert group_metrics([trace(*pair("solver", 0, (1.0, None)))])["failed/solver"] == 0.5


def test_a_reward_models_sign_is_no_penalty() -> None:
    low = [turn("solver", 0, i, r, local_reward=r, committed=i == 0) for i, r in enumerate((-4.0, -5.0))]
    settings = GroupSettings(group_size=2, advantage="group", agent_weights={}, penalties=False)
    assert credits([trace(*low)], settings)[0] == pytest.approx(0.5**0.5, rel=1e-3)
