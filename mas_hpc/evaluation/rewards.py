"""Verifiable rewards of the roles: ground truth only, no model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mas_hpc.evaluation.graders import grade
from mas_hpc.orchestration.episode import Team
from mas_hpc.types import Task, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiableJudge:
    """Role-local rewards as in MarsRL (arXiv 2511.11373).

    An answer earns 1 when it is right; breaking an earlier right answer costs `break_penalty`.
    A verdict earns 1 when it equals the truth about the latest answer; an unreadable one earns 0.
    """

    break_penalty: float = 0.0

    def score(self, task: Task, team: Team, path: Sequence[Turn], turn: Turn) -> Turn:
        """Return the turn with its truth and local reward; a failed turn has no reward, and no truth if it gives an answer."""
        before = grade(task, team.answer(path))
        judges = team.agents[turn.agent].role.produces == "verdict"
        if turn.finish == "error":
            return replace(turn, truth=before) if judges else turn
        if judges:
            return replace(turn, truth=before, local_reward=float(turn.verdict is not None and turn.verdict == before))
        right = grade(task, turn.answer)
        return replace(turn, truth=right, local_reward=-self.break_penalty if before and not right else float(right))

    def outcome(self, task: Task, answer: str | None) -> float:
        """1.0 for a right team answer, else 0.0."""
        return float(grade(task, answer))
