"""Is a given answer right? Model text is untrusted: unreadable, endless or hostile text is wrong, never an error."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction

from mas_hpc.data.compact_puzzles import text_for_scorer
from mas_hpc.errors import DataError
from mas_hpc.evaluation.judge import Judge, JudgeError
from mas_hpc.types import Task

MAX_CHARS = 10_000
"""Longer answers are wrong: the longest references (moves of a tower of Hanoi) have some thousand characters."""
MAX_FORMULA_CHARS = 300
"""The same for formulas; the longest reference of MATH-500 has 53."""

_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}|([+-]?)(\d+)\s*/\s*(\d+)")
_WORD = re.compile(r"(?:\\text\{)?\s*([A-Za-z]{4,})\s*\}?")
_CALL = re.compile(r"(\w+|[)\]}'\"])\s*\(")
_MATHEMATICS = frozenset(
    (
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "exp",
        "log",
        "ln",
        "sqrt",
        "Abs",
        "Integral",
        "pi",
        "and",
        "or",
        "not",
    )
)


def grade(task: Task, answer: str | None) -> bool:
    """Does `answer` solve the task? None (no readable answer) is wrong. Raises DataError when the task is unusable."""
    if task.grader not in GRADERS:
        raise DataError(f"task {task.id}: unknown grader {task.grader!r}; expected one of {sorted(GRADERS)}")
    return answer is not None and GRADERS[task.grader](task, answer)


def _exact(task: Task, answer: str) -> bool:
    """The same text after trimming."""
    return answer.strip() == task.answer.strip()


def _ring(task: Task, answer: str) -> bool:
    """All neighbour sums fit; blanks and commas between the digits are allowed. The task says sums and modulus."""
    modulus = re.search(r"modulo (\d+)", task.question)
    if modulus is None or int(modulus[1]) < 2 or not re.fullmatch(r"[0-9]{3,}", task.compact):
        raise DataError(f"task {task.id}: expected 'modulo <m>' in the question and digits in compact={task.compact!r}")
    if len(answer) > MAX_CHARS:
        return False
    text = re.sub(r"[\s,]", "", answer)
    if not re.fullmatch(f"[0-9]{{{len(task.compact)}}}", text):
        return False
    digits = [int(digit) for digit in text]
    neighbours = zip(digits, [*digits[1:], digits[0]], map(int, task.compact), strict=True)
    fits = all((left + right) % int(modulus[1]) == total for left, right, total in neighbours)
    return fits and max(digits) < int(modulus[1])


def _math(task: Task, answer: str) -> bool:
    """Equal as numbers, else as text, else as formulas (math-verify)."""
    if not task.answer.strip():
        raise DataError(f"task {task.id}: the reference answer is empty")
    if len(answer) > MAX_FORMULA_CHARS:
        return False
    reference, given = _bare(task.answer), _bare(answer)
    left, right = _value(reference), _value(given)
    if left is not None and right is not None:
        return left == right
    if word := _WORD.fullmatch(reference):  # as a formula, "east" is a product of letters and equal to "seat"
        other = _WORD.fullmatch(given)
        return other is not None and other[1].lower() == word[1].lower()
    return bool(given) and (reference == given or _same_formula(task.id, reference, given))


def _bare(text: str) -> str:
    r"""Without dollar signs, $-delimiters, \left, \right, thin spaces, outer blanks and a closing full stop."""
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;]|\\?\$", "", text)
    return text.strip().removesuffix(".").strip()


def _value(text: str) -> Fraction | None:
    r"""The number that the text is: 2,125  -3  .5  50\%  1/2  \frac{1}{2}  90^\circ. None when it is no bare number."""
    text = re.sub(r"\s*(\\?%|\^\{?\\circ\}?)$", "", text).replace("\N{MINUS SIGN}", "-")
    if fraction := _FRACTION.fullmatch(text):
        sign, top, bottom = fraction.groups()[:3] if fraction[2] else fraction.groups()[3:]
        return None if int(bottom) == 0 else Fraction(int(sign + top), int(bottom))
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) and re.search(r"\d", text) else None


@functools.cache
def _judge() -> Judge:
    return Judge()


@functools.lru_cache(maxsize=4096)
def _same_formula(task_id: str, reference: str, given: str) -> bool:
    try:
        return _judge().ask("math", reference, given)
    except JudgeError as error:
        raise DataError(f"task {task_id}: reference answer {reference!r}: {error}; use data.grader=exact") from None


def _reasoning_gym(task: Task, answer: str) -> bool:
    """Full marks from the library's own scorer, which reads the tiny model's answers in translation."""
    if not re.fullmatch(r"reasoning_gym/\w+/(?:\w+=[\d.e+-]+/)*-?\d+/\d+/\d+", task.id):
        raise DataError(
            f"task {task.id}: expected an id reasoning_gym/<name>/[<setting>=<number>/...]<seed>/<size>/<index>, "
            "as data.tasks makes it"
        )
    if len(answer) > MAX_CHARS or _could_call(answer):
        return False
    try:
        return _judge().ask("reasoning_gym", task.id, text_for_scorer(task, answer.strip()), task.question)
    except JudgeError as error:
        raise DataError(f"task {task.id}: {error}") from None


def _could_call(text: str) -> bool:
    """Some of the library's scorers pass the answer to eval: text that could call more than mathematics is refused."""
    if "__" in text or ("(" in text and ("#" in text or "\\" in text)):  # comments and line joins hide a call
        return True
    called = _CALL.findall(text)
    words = re.findall(r"\b[^\W\d]\w+", text) if called else []  # none that gives another function an allowed name
    return any(name not in _MATHEMATICS for name in (*called, *words))


GRADERS: dict[str, Callable[[Task, str], bool]] = {
    "exact": _exact,
    "math": _math,
    "reasoning_gym": _reasoning_gym,
    "ring": _ring,
}
