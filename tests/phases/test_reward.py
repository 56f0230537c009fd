"""Rewards from models: where scores are read in sampled text, and what counts as no reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from mas_hpc.config_methods import GRPOConfig
from mas_hpc.phases.reward import RewardModel, rewarded
from mas_hpc.types import Task, Trace, Turn

TOKENS = {1: "a", 2: "b", 3: "\n", 4: "\n\n", 5: ""}  # 5 is the end token


@dataclass(frozen=True)
class Words:
    """A tokenizer that can only decode."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(TOKENS[token] for token in ids)


ROLE = SimpleNamespace(role=SimpleNamespace(produces="answer"))
RUN = SimpleNamespace(
    tokenizer=Words(),
    team=SimpleNamespace(agents={"solver": ROLE}, template=SimpleNamespace(limit=lambda task, agent: 8)),
)


def turn(ids: tuple[int, ...], reward: float | None = 0.0, **fields) -> Turn:
    return Turn(
        id="t", parent=None, task_id="q", agent="solver", policy="p", index=0, prompt_ids=(1,), prompt_spans=(("", 1),),
        completion_ids=ids, behavior_logprobs=(-1.0,) * len(ids), text="", reward=reward, local_reward=reward,
        finish="stop", committed=True, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "places"),
    [
        ((1, 4, 2, 4, 5), [1, 3]),  # both steps are ended; the end token is no step
        ((1, 4, 2, 5), [1, 3]),  # the last step ends with the answer
        ((1, 3, 3, 2), [2, 3]),  # a separator of two tokens is read at its last one
        ((5,), [0]),  # nothing was written: one score, where it ended
    ],
)
def test_a_prm_reads_sampled_text_at_the_ends_of_its_steps(ids, places) -> None:
    model = RewardModel(network=None, reads="steps", separator="\n\n")  # type: ignore[arg-type]
    assert model._places(turn(ids), RUN) == places


def test_the_tiny_models_steps_are_its_tokens_and_a_reward_model_reads_the_last() -> None:
    steps, answer = (RewardModel(network=None, reads=reads, separator="") for reads in ("steps", "answer"))
    assert steps._places(turn((1, 2, 1)), RUN) == [0, 1, 2]
    assert answer._places(turn((1, 2, 1)), RUN) == [2]


class Fixed(RewardModel):
    """Gives every turn the same scores."""

    def score(self, run, turns):
        return [{0: -0.5, 1: math.nan if turn.id == "bad" else 2.0} for turn in turns]


def test_g22_a_reward_that_is_not_finite_is_none_and_the_worst_step_counts() -> None:
    model = Fixed(network=None, reads="answer", separator="")
    turns = (turn((1, 2)), replace(turn((1, 2)), id="bad"), replace(turn((1, 2), reward=None), id="failed"))
    (found,), steps = rewarded(RUN, [Trace(task=Task(id="q", question="", answer=""), turns=turns)], GRPOConfig(), model)
    assert [item.reward for item in found.turns] == [-0.5, None, None]
    assert steps == {}


def test_length_and_truncation_have_a_price() -> None:
    long = replace(turn((1,) * 8, reward=1.0), finish="length")
    method = GRPOConfig(overlong_buffer=4, truncated="penalize")
    (found,), _ = rewarded(RUN, [Trace(task=Task(id="q", question="", answer=""), turns=(long,))], method, None)
    assert found.turns[0].reward == pytest.approx(1.0 - 1.0 - 1.0)  # G38: at the limit the penalty is 1
