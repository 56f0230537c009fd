"""How answers and verdicts are read from text. Standard library only; text is untrusted."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_IS = re.compile(r"answer(?:\s+is)?\s*[:=]?\s*\$?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
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
    """The final answer in free text: last \\boxed{}, else the last "answer is N", else the last number, else None."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed or None
    found = _ANSWER_IS.findall(text) or _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def read_verdict(text: str) -> bool | None:
    """The last "VERDICT: CORRECT" or "VERDICT: INCORRECT"; None when there is none."""
    found = _VERDICT.findall(text)
    return found[-1].upper() == "CORRECT" if found else None
