"""Which tokens share a return."""

from __future__ import annotations

from mas_hpc.config_methods import GRPOConfig, PPOConfig
from mas_hpc.credit_assignment.assign import to_samples
from mas_hpc.phases.batch import with_credit
from mas_hpc.phases.online import trajectories
from mas_hpc.types import Task, Trace, Turn


def turn(name: str, agent: str) -> Turn:
    return Turn(
        id=name, parent=None, task_id="q", agent=agent, policy="p", index=0, prompt_ids=(1,), prompt_spans=(("", 1),),
        completion_ids=(2,), behavior_logprobs=(-1.0,), text="", finish="stop", committed=True, reward=1.0,
    )  # fmt: skip


def test_an_agents_turns_share_their_returns_unless_each_earns_the_whole_outcome() -> None:
    turns = (turn("a", "reviser"), turn("b", "verifier"), turn("c", "reviser"))
    traces = [with_credit(Trace(task=Task(id="q", question="", answer=""), turns=turns), lambda turn: turn.reward)]
    samples = to_samples(traces)
    for method in (PPOConfig(), GRPOConfig(advantage="reinforce_pp", group_by="agent")):
        assert trajectories(method, traces, samples) == [(0, "reviser"), (0, "verifier"), (0, "reviser")]
    assert trajectories(GRPOConfig(advantage="reinforce_pp"), traces, samples) == ["a", "b", "c"]
