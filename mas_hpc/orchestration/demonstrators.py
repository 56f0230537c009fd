"""Who writes the warm-start transcripts: true verdicts always, answers with planted errors and, if asked, a habitual slip."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from mas_hpc.agents.agent import Agent
from mas_hpc.orchestration.demonstrate import Draft
from mas_hpc.types import Task, Turn

Grade = Callable[[Task, str | None], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class RingDemonstrator:
    """Writes ring answers digit by digit, x_(i+1) = s_i - x_i, and one mark a sum for verdicts.

    It does not know the right first digit: it guesses one, and as Reviser takes the next one after a rejection. In
    `slip_rate` of its answers it has a habit, one too much where (s_i, x_i) is in SLIPS. In `wrong_rate` some or all
    digits are random: later roles read these answers, nobody is trained to write them.
    """

    modulus: int
    slip_rate: float
    wrong_rate: float

    SLIPS = frozenset({(0, 1), (0, 2), (0, 3)})

    def __call__(self, task: Task, agent: Agent, path: Sequence[Turn], rng: Random) -> Draft:
        """The text of one turn."""
        sums = [int(digit) for digit in task.compact]
        previous = [turn for turn in path if turn.answer is not None]
        if agent.role.produces == "verdict":
            return Draft(text=self._verdict(sums, [int(digit) for digit in previous[-1].answer or ""]))
        if previous and path[-1].verdict is True:
            return Draft(text=previous[-1].answer or "")
        if previous and path[-1].verdict is None:  # nobody judges: a debater or aggregator checks what it reads
            right = [turn.answer for turn in previous if self._verdict(sums, [int(d) for d in turn.answer or ""]).endswith("+")]
            if right:
                return Draft(text=right[-1] or "")
        first = (int((previous[-1].answer or "0")[0]) + 1) % self.modulus if previous else rng.randrange(self.modulus)
        digits = self._complete(sums, first, slips=rng.random() < self.slip_rate)
        if rng.random() >= self.wrong_rate:
            return Draft(text="".join(map(str, digits)))
        return Draft(text="".join(map(str, self._corrupt(digits, rng))), trained=False)

    def answer(self, task: Task, rng: Random, *, right: bool) -> str:
        """The reference, or some of its digits redrawn until a sum fails."""
        sums, digits = [int(digit) for digit in task.compact], [int(digit) for digit in task.answer]
        while not right and self._verdict(sums, digits).endswith("+"):
            digits = self._corrupt(digits, rng)
        return "".join(map(str, digits))

    def steps(self, task: Task, answer: str) -> list[bool]:
        """Whether each digit fits the one before it; the last must also close the ring."""
        marks = self._verdict([int(digit) for digit in task.compact], [int(digit) for digit in answer])
        holds = [mark == "=" for mark in marks[:-1]]
        return [True, *holds[:-2], holds[-2] and holds[-1]]

    def _complete(self, sums: Sequence[int], first: int, *, slips: bool) -> list[int]:
        digits = [first]
        for total in sums[:-1]:
            slip = slips and (total, digits[-1]) in self.SLIPS
            digits.append((total - digits[-1] + slip) % self.modulus)
        return digits

    def _corrupt(self, digits: Sequence[int], rng: Random) -> list[int]:
        rate = 1.0 if rng.random() < 0.35 else 1.5 / len(digits)
        return [rng.randrange(self.modulus) if rng.random() < rate else digit for digit in digits]

    def _verdict(self, sums: Sequence[int], digits: Sequence[int]) -> str:
        around = [*digits[1:], digits[0]]
        holds = [(a + b) % self.modulus == s for a, b, s in zip(digits, around, sums, strict=True)]
        return "".join("=" if ok else "!" for ok in holds) + ("+" if all(holds) else "-")


class PuzzleRules(Protocol):
    """What a demonstrator must know of a puzzle whose answers are grids of single characters."""

    symbols: str
    """What the cells of an answer are written with; its other characters are fixed."""

    def marks(self, task: Task, answer: str) -> str:
        """`=` or `!` for each cell of the answer."""
        ...

    def habit(self, task: Task) -> str:
        """The answer of a solver that leaves out part of the rules."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningDemonstrator:
    """Writes answers in `compact_answer`'s form, and for verdicts a mark a cell, then + or - as the answer is graded.

    In `slip_rate` of its answers, first and revised alike, it follows the puzzle's habit. In `wrong_rate` some or all
    cells are random: later roles read these answers, nobody is trained to write them.
    """

    rules: PuzzleRules
    grade: Grade
    slip_rate: float
    wrong_rate: float

    def __call__(self, task: Task, agent: Agent, path: Sequence[Turn], rng: Random) -> Draft:
        """The text of one turn."""
        previous = [turn.answer for turn in path if turn.answer is not None]
        if agent.role.produces == "verdict":
            return Draft(text=self.rules.marks(task, previous[-1]) + "-+"[self.grade(task, previous[-1])])
        if previous and path[-1].verdict is True:
            return Draft(text=previous[-1])
        answer = self.rules.habit(task) if rng.random() < self.slip_rate else task.compact_answer
        if rng.random() >= self.wrong_rate:
            return Draft(text=answer)
        return Draft(text=self._corrupt(answer, rng), trained=False)

    def answer(self, task: Task, rng: Random, *, right: bool) -> str:
        """The reference, or some of its cells redrawn until it is wrong."""
        answer = task.compact_answer
        while not right and self.grade(task, answer):
            answer = self._corrupt(answer, rng)
        return answer

    def _corrupt(self, answer: str, rng: Random) -> str:
        rate = 1.0 if rng.random() < 0.35 else 2.5 / len(answer)
        redrawn = (char in self.rules.symbols and rng.random() < rate for char in answer)
        return "".join(rng.choice(self.rules.symbols) if new else char for char, new in zip(answer, redrawn, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceDemonstrator:
    """Writes the reference solution; in `wrong_rate` of the answers a number in it is changed, and it is not trained on."""

    grade: Grade
    wrong_rate: float
    compact: bool
    """Whether texts are bare answers and verdicts in the compact alphabet."""

    def __call__(self, task: Task, agent: Agent, path: Sequence[Turn], rng: Random) -> Draft:
        """The text of one turn."""
        previous = [turn for turn in path if turn.answer is not None]
        if agent.role.produces == "verdict":
            return Draft(text=self._verdict(task, previous[-1].answer if previous else None))
        wrong = rng.random() < self.wrong_rate and not (previous and path[-1].verdict is True)
        return Draft(text=self.answer(task, rng, right=not wrong), trained=not wrong)

    def answer(self, task: Task, rng: Random, *, right: bool) -> str:
        """The reference solution, or with one digit of its result changed."""
        answer = task.answer if right else _changed(task.answer, rng)
        return answer if self.compact else self._solution(task, answer)

    def _verdict(self, task: Task, answer: str | None) -> str:
        right = self.grade(task, answer)
        if self.compact:
            return "".join("=" if a == b else "!" for a, b in zip(answer or "", task.answer, strict=True)) + "-+"[right]
        return f"The answer is {'right' if right else 'wrong'}.\nVERDICT: {'CORRECT' if right else 'INCORRECT'}"

    def _solution(self, task: Task, answer: str) -> str:
        steps = f"{task.solution.strip()}\n" if task.solution else ""
        return f"{steps}The final answer is \\boxed{{{answer}}}."


def _changed(answer: str, rng: Random) -> str:
    """The answer with one digit changed; a text without digits gets a question mark."""
    places = [match.start() for match in re.finditer(r"\d", answer)]
    if not places:
        return f"{answer}?"
    place = rng.choice(places)
    digit = (int(answer[place]) + rng.randrange(1, 10)) % 10
    return f"{answer[:place]}{digit}{answer[place + 1 :]}"
