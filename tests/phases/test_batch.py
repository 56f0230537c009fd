"""The episodes of an online step: which are kept, and their metrics."""

from __future__ import annotations

import io
from dataclasses import replace
from statistics import pstdev

import pytest
from rich.console import Console

from mas_hpc.config_methods import ATGRPOConfig, GRPOConfig
from mas_hpc.phases.batch import Batch, batch_metrics, print_completions, with_credit
from mas_hpc.types import Task, Trace, Turn


def turn(name: str, tokens: int, reward: float | None, **fields) -> Turn:
    given = {"finish": "stop", "committed": True, "agent": "solver", "text": "12", "index": 0} | fields
    return Turn(
        id=name, parent=None, task_id="q", policy="p", prompt_ids=(1,), prompt_spans=(("", 1),), reward=reward,
        completion_ids=(2,) * tokens, behavior_logprobs=(-1.0,) * tokens, local_reward=reward, **given,
    )  # fmt: skip


def trace(task: str, *turns: Turn, reward: float = 0.0) -> Trace:
    return Trace(task=Task(id=task, question=f"is {task}?", answer=""), turns=turns, reward=reward)


def batch(*names: str, step: int = 0) -> Batch:
    """One episode a name, whose reward is its place."""
    traces = [trace(name, turn(f"{name}{n}", 1, float(n))) for n, name in enumerate(names)]
    return Batch(step=step, traces=traces, outcomes=[float(n) for n in range(len(names))], steps={names[0]: {0: 1.0}})


def test_costs_of_all_rounds_of_sampling_add_up_also_of_episodes_that_were_put_aside() -> None:
    first, second = (
        replace(batch(*names), tokens=tokens, credit={"credit/sampled": sampled, "erased_by_centring/solver": share})
        for names, tokens, sampled, share in ((("p", "q"), 10.0, 4.0, 0.5), (("r", "s"), 20.0, 6.0, 0.25))
    )
    joined = first.only({"p"}).joined(second, num_tasks=2)
    assert [item.task.id for item in joined.traces] == ["p", "r"] and joined.tokens == 30.0
    assert joined.credit == {"credit/sampled": 10.0, "erased_by_centring/solver": 0.5}


def test_only_keeps_episodes_with_their_outcomes() -> None:
    kept = batch("p", "q", "p", "r").only({"p", "r"})
    assert [item.task.id for item in kept.traces] == ["p", "p", "r"] and kept.outcomes == [0.0, 2.0, 3.0]
    assert batch("p").only(set()).traces == []


def test_joined_adds_further_questions_up_to_a_number() -> None:
    have, more = batch("p", "p"), batch("p", "q", "r", "q", "s")
    joined = have.joined(more, num_tasks=3)
    assert [item.task.id for item in joined.traces] == ["p", "p", "q", "r", "q"]
    assert joined.outcomes == [0.0, 1.0, 1.0, 2.0, 3.0]
    assert have.joined(more, num_tasks=1).traces == have.traces


def test_credit_is_replaced_on_every_turn() -> None:
    item = trace("p", turn("a", 1, 1.0), turn("b", 1, None))
    assert [t.credit for t in with_credit(item, lambda t: t.reward).turns] == [1.0, None]


def test_metrics_of_a_batch_by_hand() -> None:
    traces = [
        trace("p", turn("a", 2, 1.0), turn("b", 4, 0.5, agent="critic"), reward=1.0),
        trace("p", turn("c", 6, 0.0, finish="length"), turn("d", 0, None, agent="critic", finish="error")),
        trace("q", turn("e", 3, 1.0), turn("f", 9, 9.0, counterfactual=True), reward=1.0),
        trace("q", turn("g", 3, 1.0), reward=1.0),
    ]
    found = batch_metrics(Batch(step=0, traces=traces, outcomes=[1.0, 0.0, 1.0, 1.0], steps={}), GRPOConfig())
    assert found == pytest.approx(
        {
            "accuracy": 0.75, "completions/mean_length": 3.0, "completions/min_length": 0.0, "completions/max_length": 6.0,
            "completions/clipped_ratio": 1 / 6, "reward": 0.75, "reward_std": pstdev([1, 0, 1, 1]),
            "frac_reward_zero_std": 0.5, "failed/solver": 0.0, "reward/solver": 0.75, "failed/critic": 0.5,
            "reward/critic": 0.5,
        }
    )  # fmt: skip


def test_a_batch_whose_episodes_all_failed_has_no_reward() -> None:
    failed = Batch(step=0, traces=[trace("p", turn("a", 0, None, finish="error"))], outcomes=[None], steps={})
    found = batch_metrics(failed, GRPOConfig())
    assert "reward" not in found and "reward/solver" not in found and found["failed/solver"] == 1.0


def test_at_grpo_has_the_metrics_of_its_state_groups() -> None:
    siblings = [turn("a", 1, 1.0), turn("b", 1, 0.0, committed=False)]
    found = batch_metrics(Batch(step=0, traces=[trace("p", *siblings)], outcomes=[1.0], steps={}), ATGRPOConfig())
    assert found["degenerate/solver"] == 0.0 and found["reward/solver"] == 0.5
    assert "frac_reward_zero_std" not in found


def test_the_table_shows_text_as_it_is_with_rewards_and_advantage() -> None:
    out = io.StringIO()
    item = with_credit(trace("p", turn("a", 1, 1.0, text="[red]x\n y[/red]")), lambda t: -0.25)
    print_completions(Console(file=out, width=120), [item], 2)
    shown = out.getvalue()
    assert "step 3" in shown and "[red]x y[/red]" in shown and "+1.000" in shown and "-0.250" in shown and "is p?" in shown
    print_completions(Console(file=out, width=120), [trace("p", turn("a", 1, 1.0))], 0)  # nothing was credited


def test_rewards_of_steps_stay_with_their_episodes_when_a_question_is_asked_again() -> None:
    have, more = batch("p", "q"), batch("p", "r")  # turn p0 of both: a question in two rounds has turns of the same ids
    more = replace(more, steps={"p0": {0: 9.0}, "r1": {0: 2.0}})
    have = replace(have, steps={"p0": {0: 1.0}, "q1": {0: 0.5}}).only({"p"})
    assert have.steps == {"p0": {0: 1.0}}
    assert have.joined(more, num_tasks=2).steps == {"p0": {0: 1.0}, "r1": {0: 2.0}}
