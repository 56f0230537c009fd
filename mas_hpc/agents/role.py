"""Roles: what an agent is asked for, what it produces and, in the compact alphabet, the letter that cues it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What one kind of agent does.

    Example: Role(name="solver", produces="answer", letter="S", prompt="Solve the question ...")
    """

    name: str
    produces: Literal["answer", "verdict"]
    letter: str
    """Cue in the compact template."""
    prompt: str
    """Instruction in chat templates."""


_ANSWER = "End with the final answer in \\boxed{}."
_VERDICT = 'End with "VERDICT: CORRECT" or "VERDICT: INCORRECT".'

ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role(
            name="solver", produces="answer", letter="S",
            prompt=f"You are the Solver. Solve the question step by step. {_ANSWER}",
        ),
        Role(
            name="critic", produces="verdict", letter="C",
            prompt=f"You are the Critic. Check the Solver's answer: recompute it and name the first error, if any. {_VERDICT}",
        ),
        Role(
            name="reviser", produces="answer", letter="R",
            prompt=f"You are the Reviser. Keep the answer if it is right, otherwise correct it. {_ANSWER}",
        ),
        Role(
            name="verifier", produces="verdict", letter="V",
            prompt=f"You are the Verifier. Decide whether the latest answer is right. {_VERDICT}",
        ),
    )
}  # fmt: skip
