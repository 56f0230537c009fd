"""Evaluation rows: the team and its controls, each as right-or-wrong on the same questions with the tokens that it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from statistics import fmean
from typing import Any

from mas_hpc.answers import majority
from mas_hpc.evaluation.graders import grade
from mas_hpc.evaluation.metrics import (
    VerdictBalance,
    avg_at_k,
    balanced_verdicts,
    maj_at_k,
    paired_test,
    pass_at_k,
    tokens_per_question,
    wilson,
)
from mas_hpc.types import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system measured on the held-out questions.

    Example: Row(name="team", phase="after", temperature=1.0, right=(True, False), tokens_per_question=21.5)
    """

    name: str
    phase: str
    """before or after training: the team; control: what it is compared with; "" for a team that is only evaluated."""
    temperature: float
    right: tuple[bool, ...]
    """One entry a question, in the same order in every row."""
    tokens_per_question: float
    verdicts: dict[str, VerdictBalance]
    """Balance of each judging agent on planted answers, every other one wrong; empty for controls."""
    repeated: dict[str, float | None] = field(default_factory=dict)
    """avg@k with its standard error, pass@k and maj@k of several episodes a question; empty for one."""
    team: dict[str, Any] = field(default_factory=dict)
    """What its traces say of the agents (team_metrics.summary); empty for controls."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return fmean(self.right)

    def to_json(self) -> dict[str, Any]:
        """Plain data for results.json, with the 95% Wilson interval."""
        low, high = wilson(sum(self.right), len(self.right))
        return {**asdict(self), "accuracy": self.accuracy, "low": low, "high": high, "num_questions": len(self.right)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Row:
        """What `to_json` gave."""
        found = {field.name: record[field.name] for field in fields(Row)}
        verdicts = {judge: VerdictBalance(**balance) for judge, balance in found["verdicts"].items()}
        return Row(**found | {"right": tuple(found["right"]), "verdicts": verdicts})


def team_row(traces: Sequence[Trace], *, phase: str, temperature: float, verdicts: dict[str, VerdictBalance]) -> Row:
    """The team's own answers; `verdicts` is how its judges do on planted answers."""
    right = tuple(trace.reward == 1.0 for trace in traces)
    return Row(
        name=f"team, {phase} training" if phase else "team",
        phase=phase,
        temperature=temperature,
        right=right,
        tokens_per_question=tokens_per_question(traces),
        verdicts=verdicts,
    )


def repeated(traces: Sequence[Sequence[Trace]]) -> dict[str, float | None]:
    """avg@k with its standard error, pass@k of every power of two and maj@k, of k episodes of each question."""
    k = len(traces[0])
    average = avg_at_k([[trace.reward == 1.0 for trace in tries] for tries in traces])
    powers = [2**power for power in range(1, k.bit_length()) if 2**power <= k]
    counts = [sum(trace.reward == 1.0 for trace in tries) for tries in traces]
    votes = [maj_at_k([trace.answer for trace in tries], partial(grade, tries[0].task), k) for tries in traces]
    return {
        "k": float(k),
        f"avg@{k}": average.mean,
        "standard_error": average.standard_error,
        **{f"pass@{power}": fmean(pass_at_k(k, count, power) for count in counts) for power in powers},
        f"maj@{k}": fmean(votes),
    }


def multi_turn_row(traces: Sequence[Trace], *, phase: str, temperature: float) -> Row:
    """One agent that answers again and again, reading its own answers: its last answer counts."""
    return Row(
        name=_control(f"{traces[0].path[0].agent} over {max(len(trace.path) for trace in traces)} turns", phase),
        phase="control", temperature=temperature, right=tuple(trace.reward == 1.0 for trace in traces),
        tokens_per_question=tokens_per_question(traces), verdicts={},
    )  # fmt: skip


def first_speaker_row(traces: Sequence[Trace], *, phase: str, temperature: float) -> Row:
    """The team's first agent alone: the first turns of the team's own traces."""
    first = [trace.path[0] for trace in traces]
    return Row(
        name=_control(f"{first[0].agent} alone", phase),
        phase="control",
        temperature=temperature,
        right=tuple(bool(turn.truth) for turn in first),
        tokens_per_question=fmean(len(turn.completion_ids) for turn in first),
        verdicts={},
    )


def vote_row(traces: Sequence[Trace], *, phase: str, temperature: float) -> Row:
    """Majority vote over the siblings of each trace's only state."""
    right = tuple(grade(trace.task, majority(turn.answer for turn in trace.turns)) for trace in traces)
    size = len(traces[0].turns)
    return Row(
        name=_control(f"majority vote of {size}", phase), phase="control", temperature=temperature, right=right,
        tokens_per_question=tokens_per_question(traces), verdicts={},
    )  # fmt: skip


def best_of_n_row(tries: Sequence[Sequence[Trace]], *, phase: str, temperature: float) -> Row:
    """Fresh (answer, verdict) tries, taken in order until the team's own critic accepts one; the last if it accepts none.

    `tries[question]` are the tries that were made. Tokens count answers and verdicts.
    """
    return Row(
        name=_control(f"best of {max(map(len, tries))} by own critic", phase), phase="control", temperature=temperature,
        right=tuple(made[-1].reward == 1.0 for made in tries),
        tokens_per_question=fmean(sum(trace.num_completion_tokens for trace in made) for made in tries),
        verdicts={},
    )  # fmt: skip


def _control(name: str, phase: str) -> str:
    return f"{name}, {phase}" if phase else name


def equal_budget(team_tokens: float, tokens_per_try: float) -> int:
    """Tries that cost at least the team's tokens: rounded up, in the control's favour."""
    return max(1, math.ceil(team_tokens / max(tokens_per_try, 1.0) - 1e-9))


def verdict_balance(traces: Sequence[Trace]) -> dict[str, VerdictBalance]:
    """Per agent that speaks last: its verdicts against the truth; a failed turn is an unreadable verdict."""
    pairs: dict[str, list[tuple[bool | None, bool]]] = {}
    for trace in traces:
        turn = trace.path[-1]
        pairs.setdefault(turn.agent, []).append((turn.verdict, bool(turn.truth)))
    return {agent: balanced_verdicts(found) for agent, found in pairs.items()}


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Paired tests of the team, before against after, for each temperature that has both."""
    found = []
    for after in (row for row in rows if row.phase == "after"):
        for before in (row for row in rows if row.phase == "before" and row.temperature == after.temperature):
            found.append({"temperature": after.temperature, **asdict(paired_test(before.right, after.right))})
    return found
