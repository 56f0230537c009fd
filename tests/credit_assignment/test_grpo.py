"""Credit of whole episodes of a team, worked out by hand."""

from __future__ import annotations

import pytest

from mas_hpc.credit_assignment.grpo import grpo, informative_tasks
from mas_hpc.types import Task, Trace, Turn


def turn(agent: str, index: int, reward: float | None, *, committed: bool = True) -> Turn:
    return Turn(
        id=f"{agent}{index}{'' if committed else 'x'}", parent=None, task_id="q", agent=agent, policy=agent, index=index,
        prompt_ids=(1,), prompt_spans=(("", 1),), completion_ids=(2,), behavior_logprobs=(-1.0,), text="", finish="stop",
        committed=committed, reward=reward,
    )  # fmt: skip


def episode(solver: float | None, critic: float | None, *, task: str = "q") -> Trace:
    """The solver's turn, then the critic's; None: that turn failed."""
    return Trace(
        task=Task(id=task, question="", answer=""),
        turns=(turn("solver", 0, solver), turn("solver", 0, 0.3, committed=False), turn("critic", 1, critic)),
    )


def credit(traces, outcomes, advantage="group_mean", group_by="task", baselines=None, decay=0.9):
    found, moved = grpo(traces, outcomes, group_by=group_by, advantage=advantage, baselines=baselines or {}, decay=decay)
    return [[turn.credit for turn in trace.turns] for trace in found], moved


def test_every_turn_of_an_episode_gets_the_advantage_of_its_outcome() -> None:
    traces = [episode(0.0, 1.0), episode(1.0, 0.0), episode(1.0, 1.0), episode(0.0, 0.0)]
    credits, _ = credit(traces, [1.0, 0.0, 0.0, 0.0])
    assert credits == [[0.75, None, 0.75], *[[-0.25, None, -0.25]] * 3]
    leave_one_out, _ = credit(traces, [1.0, 0.0, 0.0, 0.0], "rloo")
    assert [row[0] for row in leave_one_out] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_g19_the_standardised_advantages_over_episodes() -> None:
    credits, _ = credit([episode(0.0, 0.0)] * 8, [1.0] * 3 + [0.0] * 5, "group")
    assert [row[2] for row in credits] == pytest.approx([1.207381] * 3 + [-0.724429] * 5, abs=1e-6)


def test_questions_are_groups_of_their_own() -> None:
    traces = [episode(0.0, 0.0, task=task) for task in ("p", "q", "p", "q")]
    credits, _ = credit(traces, [1.0, 5.0, 0.0, 5.0])
    assert [row[0] for row in credits] == [0.5, 0.0, -0.5, 0.0]


def test_by_agent_a_turn_is_compared_by_its_own_reward() -> None:
    traces = [episode(1.0, 0.5), episode(0.0, 0.5), episode(0.5, 2.0)]
    credits, _ = credit(traces, [0.0, 0.0, 9.0], group_by="agent")
    assert [row[0] for row in credits] == [0.5, -0.5, 0.0]
    assert [row[2] for row in credits] == [-0.5, -0.5, 1.0]


def test_by_agent_a_turn_that_one_episode_alone_reached_has_nothing_to_be_compared_with() -> None:
    short = Trace(task=Task(id="q", question="", answer=""), turns=(turn("solver", 0, 1.0),))
    for advantage in ("group", "group_mean", "group_batch", "rloo"):
        credits, _ = credit([episode(0.0, 1.0), short], [0.0, 1.0], advantage, group_by="agent")
        assert credits[0][2] == 0.0 and credits[0][0] == -credits[1][0] < 0.0


def test_g22_failed_episodes_and_turns_are_in_no_baseline_and_get_no_credit() -> None:
    traces = [episode(1.0, 1.0), episode(0.0, 0.0), episode(0.0, None), episode(None, 0.0)]
    credits, _ = credit(traces, [1.0, 0.0, None, 0.0])
    third = pytest.approx(1 / 3)
    assert credits[0] == [1 - third.expected, None, 1 - third.expected]
    assert credits[2] == [None, None, None]
    assert credits[3][0] is None and credits[3][2] == pytest.approx(-1 / 3)
    by_agent, _ = credit(traces, [1.0, 0.0, None, 0.0], group_by="agent")
    assert [row[0] for row in by_agent] == pytest.approx([2 / 3, -1 / 3, -1 / 3, None])
    assert by_agent[2][2] is None


def test_moving_averages_of_the_agents_move_in_order() -> None:
    traces = [episode(1.0, 0.0), episode(1.0, None), episode(0.0, 1.0)]
    credits, moved = credit(traces, [1.0, None, 0.0], "rae", "agent", baselines={"solver": 0.5}, decay=0.5)
    # solver: 1 - .5, b .75; 1 - .75, b .875; 0 - .875, b .4375. critic: 0 - 0, b 0; failed; 1 - 0, b .5
    assert [row[0] for row in credits] == [0.5, 0.25, -0.875]
    assert [row[2] for row in credits] == [0.0, None, 1.0]
    assert moved == {"solver": 0.4375, "critic": 0.5}
    by_task, moved = credit(traces, [1.0, None, 0.0], "rae", decay=0.5)
    assert [row[0] for row in by_task] == [1.0, None, -0.5] and moved == {"solver": 0.25, "critic": 0.25}


def test_reinforce_pp_keeps_the_reward_itself() -> None:
    traces = [episode(1.0, 0.25), episode(0.0, None)]
    assert credit(traces, [3.0, 4.0], "reinforce_pp")[0] == [[3.0, None, 3.0], [4.0, None, None]]
    assert credit(traces, [3.0, 4.0], "reinforce_pp", "agent")[0] == [[1.0, None, 0.25], [0.0, None, None]]


def test_questions_whose_episodes_differ_are_informative() -> None:
    traces = [episode(0.0, 0.0, task=task) for task in ("p", "p", "q", "q", "r", "r")]
    assert informative_tasks(traces, [1.0, 0.0, 1.0, 1.0, 1.0, None]) == {"p"}
