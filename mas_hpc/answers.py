"""How answers and verdicts are read from text. Standard library only; text is untrusted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DIGITS = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?"
_ANSWER_IS = re.compile(
    rf"answer(?:\s+is)?\s*[:=]?\s*\$?(-?{_DIGITS})(?:[ $]*[-+*/x][ $]*{_DIGITS})*(?:[ $]*=[ $]*(-?{_DIGITS}))?", re.IGNORECASE
)  # the answer is 8 + 10 = 18
_NUMBER = re.compile(rf"(?:(?<![\w)])-)?{_DIGITS}")  # the minus of 3-4 is not a sign
_VERDICT = re.compile(r"VERDICT\W{0,4}(CORRECT|INCORRECT)\b", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{} whose braces balance; None when there is none."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def read_answer(text: str) -> str | None:
    """The final answer in free text: last \\boxed{}, else the last "answer is N" or "= N", else the last number, else None."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed or None
    found = [result or first for first, result in _ANSWER_IS.findall(text)] or _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def read_verdict(text: str) -> bool | None:
    """What the last line with a "VERDICT: CORRECT" or "VERDICT: INCORRECT" says; None when there is none, or it says both."""
    for line in reversed(text.splitlines()):
        found = {verdict.upper() for verdict in _VERDICT.findall(line)}
        if found:
            return found == {"CORRECT"} if len(found) == 1 else None
    return None


def majority(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer, the first seen among equals; None (no answer) never wins over an answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)
