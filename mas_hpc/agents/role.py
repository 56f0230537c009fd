"""Roles: what an agent is asked for, what it produces and, in the compact alphabet, the letter that cues it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Produces = Literal["answer", "verdict", "text"]
Sees = Literal["transcript", "question", "answers", "latest", "references"]
LETTERS: dict[Produces, str] = {"answer": "S", "verdict": "C", "text": "?"}
"""Cue letters of roles that users define."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What one kind of agent does.

    Example: Role(name="solver", produces="answer", letter="S", prompt="Solve the question ...")
    """

    name: str
    produces: Produces
    """answer: may become the team's; verdict: accepts or rejects the latest answer; text: what others read, such as a plan."""
    letter: str
    """Cue in the compact template."""
    prompt: str
    """Instruction in chat templates."""
    sees: Sees = "transcript"
    """What an agent of this role reads if the team does not say."""


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
        Role(
            name="debater", produces="answer", letter="S",
            prompt="You are one of several Debaters. Solve the question step by step; where others have answered, compare "
            f"their reasoning with yours and keep or correct your answer. {_ANSWER}",
        ),
        Role(
            name="judge", produces="answer", letter="R",
            prompt=f"You are the Judge of the debate. Weigh the answers above and decide which is right. {_ANSWER}",
        ),
        Role(
            name="proposer", produces="answer", letter="S", sees="references",
            prompt=f"You are a Proposer. Solve the question step by step; use responses of others critically. {_ANSWER}",
        ),
        Role(
            name="aggregator", produces="answer", letter="R", sees="references",
            prompt="You are the Aggregator. Some of the responses may be biased or wrong: evaluate them critically and "
            f"synthesize them into one accurate solution. {_ANSWER}",
        ),
    )
}  # fmt: skip
