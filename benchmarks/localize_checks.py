"""Checks by execution for two tasks of BIG-Bench Mistake whose steps follow a fixed form: swaps, and sorting by letters.

Each takes (question, steps) and returns the index of the first step that does not follow from the one before it, -1 if none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

_PERSON = r"\b(Alice|Bob|Claire|Dave|Eve|[A-E])\b"
_SWAP = re.compile(rf"{_PERSON} and {_PERSON},? (?:swap|trade|switch)")
_START = re.compile(rf"{_PERSON} (?:gets|has an?|is dancing with|is playing) (.+?)(?: ball)?(?:,|\.\n|\.$|\. )")
_STATE = re.compile(rf"{_PERSON}(?::| has| gets| is dancing with| is playing) ?(?:the |an? )?([^,.:]+)")
_LETTER = re.compile(r'"([^"]+)": "(\w)" \((\d+)\)')
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def first_wrong_swap(question: str, steps: Sequence[str]) -> int:
    """A step is wrong if it swaps another pair than the question's next one, or states what the swap does not lead to."""
    items = {person[0]: item for person, item in _START.findall(question.split("\n")[0])}
    waiting, state = _swaps(question), dict(items)
    for index, step in enumerate(steps):
        named = _swaps(step)
        stated = {person[0]: _nearest(value, items) for person, value in _STATE.findall(step)}
        swaps = bool(named) or (index > 0 and len(stated) > 1)  # "B: pink, C: blue" is a swap that is not named
        if swaps and waiting:
            pair = waiting.pop(0)
            if named and named[0] != pair:
                return index
            first, second = sorted(pair)
            state = state | {first: state[second], second: state[first]}
        if any(item is not None and state.get(person) != item for person, item in stated.items()):
            return index
    return -1


def _swaps(text: str) -> list[set[str]]:
    """The pairs that swap, by initials, in order."""
    return [{first[0], second[0]} for first, second in _SWAP.findall(text)]


def _nearest(value: str, items: Mapping[str, str]) -> str | None:
    """The item that shares most words with the value; None when none shares any, or several share as many."""
    words = set(re.findall(r"\w+", value.lower())) - {"the", "of"}
    shared = {item: len(words & set(re.findall(r"\w+", item.lower()))) for item in items.values()}
    best = [item for item, count in shared.items() if count and count == max(shared.values())]
    return best[0] if len(best) == 1 else None


def first_wrong_sorting_step(question: str, steps: Sequence[str]) -> int:
    """A step is wrong if it misreads a letter, loses or adds a word, orders words wrongly, or sorts another part than due."""
    words, depth, due = sorted(question.split()), 0, None
    part: list[str] = words
    for index, step in enumerate(steps):
        if step.startswith("I have now sorted"):
            answer = step.split("answer is ")[-1].split()
            return -1 if answer == words and due is None else index
        named = re.search(r"subpart (\[[^\]]*\]) by", step)
        if named:
            part = _words(named.group(1))
            if due is not None and sorted(part) != sorted(due):
                return index
        ordinal = re.search(r"The (\w+) letter:", step)
        depth = _ORDINALS.index(ordinal.group(1)) if ordinal and ordinal.group(1) in _ORDINALS else depth
        if not _letters_right(step, depth, part):
            return index
        if step.startswith("We now have"):
            head, _, whole = step.partition("Hence, we have")
            if not _sorted_right(head, part) or (whole and not _sorted_right(whole, words)):
                return index
            brackets = re.findall(r"\[[^\]]*\]", whole or head)
            due = _words(brackets[0]) if brackets else None
    return -1


def _words(text: str) -> list[str]:
    return re.findall(r'"([^"]+)"', text)


def _letters_right(step: str, depth: int, part: Sequence[str]) -> bool:
    claims = _LETTER.findall(step)
    right = all(word[depth : depth + 1] == letter and ord(letter) - 96 == int(number) for word, letter, number in claims)
    return right and (not claims or sorted(word for word, _, _ in claims) == sorted(part))


def _sorted_right(chain: str, expected: Sequence[str]) -> bool:
    """All words of the part, and none of a group after one of the next group."""
    groups = [_words(group) for group in chain.split(" < ")]
    ordered = all(max(left) <= min(right) for left, right in pairwise(groups) if left and right)
    return ordered and sorted(word for group in groups for word in group) == sorted(expected)
