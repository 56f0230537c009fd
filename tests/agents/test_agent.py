"""What an agent reads of the committed turns, and what it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import LETTERS, ROLES, Sees
from mas_hpc.types import Turn

AGENTS = {
    name: Agent(name=name, role=ROLES[role], policy="p", sees="transcript", max_new_tokens=4)
    for name, role in (("ada", "debater"), ("ben", "debater"), ("critic", "critic"), ("judge", "judge"))
}


def turn(name: str, agent: str, parent: str | None) -> Turn:
    return Turn(
        id=name, parent=parent, task_id="q", agent=agent, policy="p", index=0, prompt_ids=(), prompt_spans=(),
        completion_ids=(), behavior_logprobs=(), text="", finish="stop",
    )  # fmt: skip


TWO_ROUNDS = (
    turn("1", "ada", None), turn("2", "ben", None), turn("3", "critic", None),
    turn("4", "ada", "3"), turn("5", "ben", "3"), turn("6", "critic", "3"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("sees", "read"),
    [("transcript", "123456"), ("question", ""), ("answers", "1245"), ("latest", "5"), ("references", "456")],
)
def test_an_agent_reads_what_it_is_said_to_see(sees: Sees, read: str) -> None:
    judge = replace(AGENTS["judge"], sees=sees)
    assert "".join(turn.id for turn in judge.view(TWO_ROUNDS, AGENTS)) == read
    assert judge.view((), AGENTS) == ()


def test_without_an_answer_there_is_no_latest() -> None:
    critic = replace(AGENTS["judge"], sees="latest")
    assert critic.view((turn("1", "critic", None),), AGENTS) == ()


def test_a_prompt_of_ones_own_replaces_the_roles() -> None:
    assert AGENTS["ada"].instruction == ROLES["debater"].prompt
    assert replace(AGENTS["ada"], prompt="Be brief.").instruction == "Be brief."


def test_roles_say_what_they_are_read_for() -> None:
    for name, role in ROLES.items():
        marker = {"answer": r"\boxed{}", "verdict": "VERDICT: CORRECT"}[role.produces]
        assert role.name == name and marker in role.prompt, "the parser finds what the prompt asks for"
        assert (role.letter in "CV") == (role.produces == "verdict")
    assert {name for name, role in ROLES.items() if role.sees == "references"} == {"proposer", "aggregator"}
    assert LETTERS == {"answer": "S", "verdict": "C", "text": "?"}
