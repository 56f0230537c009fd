"""Arithmetic in free text, checked by execution: which stated equalities are false, and the first wrong step of a solution.

Expressions are evaluated exactly, over fractions, with bounds on their size: the text is untrusted. What cannot be read with
confidence (unknowns, other functions, conversions between units) is no statement, hence neither right nor wrong.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

from mas_hpc.credit_assignment.arithmetic_text import Chain, Side, read_chains

MAX_PIECES = 200
"""Longest side that is evaluated, in numbers, operators and parentheses."""
MAX_BITS = 2048
"""Largest numerator or denominator that is computed."""

_MARK = re.compile(r"<<([^<>]{1,200})>>")  # GSM8K's calculator marks
_OPERATORS: Mapping[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
DIMENSIONS = (
    frozenset({"second", "minute", "hour", "day", "week", "month", "year", "decade"}),
    frozenset({"$", "dollar", "cent", "penny", "pennie", "nickel", "dime", "quarter"}),
    frozenset({"inch", "inche", "foot", "feet", "ft", "yard", "mile", "mm", "cm", "km", "meter", "kilometer", "centimeter"}),
    frozenset({"gram", "kg", "kilogram", "ounce", "oz", "pound", "lb", "ton"}),
    frozenset({"cup", "pint", "quart", "gallon", "ounce", "oz", "liter", "ml", "milliliter", "tablespoon", "teaspoon"}),
)
"""Units that are converted into each other, in the singular."""
MULTIPLES = frozenset({"dozen", "dozens", "pair", "pairs", "hundred", "thousand", "million", "billion", "half", "percent"})
_HUNDREDTH = Fraction(1, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One equality that was found in a text and computed.

    Example: check("so 12 x 3 = 35") == (Statement(start=3, end=14, text="12 x 3 = 35", expression="12 * 3",
        left=Fraction(36), right=Fraction(35), holds=False),)
    """

    start: int
    """Where it begins in the text, in characters."""
    end: int
    text: str
    expression: str
    """The left side with plain signs, without units."""
    left: Fraction
    """A percent sign is read as 1/100."""
    right: Fraction
    holds: bool
    """Equal, exactly or within the rounding of a decimal: 10/3 = 3.33 holds."""


class _Unbounded(ArithmeticError):
    """A number is larger than MAX_BITS."""


def check(text: str, names: Mapping[str, Fraction] | None = None) -> tuple[Statement, ...]:
    """Every equality of the text that can be computed, in order; `names` gives the values of single capital letters.

    Read are numbers (with separators of thousands, decimals, %, money, units), + - * / ^, the signs x and the Unicode and
    LaTeX ones, parentheses, \\frac, "1/3 of 12", chains a = b = c (each neighbouring pair is a statement), GSM8K's <<a=b>>,
    and letters: "A = 2 + 3 = 5" gives A the value 5 from there on. An equality between two numbers without an operator
    (12 = 1 dozen) is a definition and no statement.
    """
    return tuple(_statements(text, read_chains(_without_marks(text)), dict(names or {}))) + tuple(
        replace(statement, start=mark.start(1) + statement.start, end=mark.start(1) + statement.end)
        for mark in _MARK.finditer(text)
        for statement in _statements(mark.group(1), read_chains(mark.group(1)), {})
    )


def first_wrong_step(steps: Sequence[str], question: str = "") -> tuple[int, str] | None:
    """Index from 0 of the first step with a false equality and what is wrong there; None when no check fails.

    A letter keeps the value that the last chain gave it, so that a step that computes with an earlier wrong result is not
    wrong itself. With `question`, an arithmetic expression, a step that rewrites it in letters ("A - B, where A = 2 + 3 and
    B = 4") is wrong when the rewritten expression has another value.
    """
    names: dict[str, Fraction] = {}
    target = _expression_value(question)
    for index, step in enumerate(steps):
        chains = read_chains(_without_marks(step))
        marks = [one for mark in _MARK.finditer(step) for one in check(mark.group(1))]
        for statement in [*_statements(step, chains, names), *marks]:
            if not statement.holds:
                return index, f"{statement.text}: the left side is {_shown(statement.left)}, not {_shown(statement.right)}"
        rewritten = _rewritten(chains, names)
        if target is not None and rewritten is not None and rewritten != target:
            return index, f"the rewritten expression is {_shown(rewritten)}, the question's is {_shown(target)}"
    return None


def _without_marks(text: str) -> str:
    return _MARK.sub(lambda mark: " " * len(mark.group()), text)


def _shown(number: Fraction) -> str:
    return str(number) if number.denominator < 10**6 else f"{float(number):.6g}"


def _expression_value(question: str) -> Fraction | None:
    """Of a question that is one arithmetic expression, with or without the equality sign after it; else None."""
    chains = read_chains(question)
    side = chains[0].sides[0] if len(chains) == 1 else None
    if side is None or side.lone or question[: side.start].strip() or question[side.end :].strip(" =?"):
        return None
    return value(side, {})


def _rewritten(chains: Sequence[Chain], names: Mapping[str, Fraction]) -> Fraction | None:
    """The value of the expression of several letters that stands in no equality; None when there is not exactly one."""
    sides = [chain.sides[0] for chain in chains if len(chain.sides) == 1]
    values = [value(side, names) for side in sides if side is not None and len(side.names) > 1]
    return values[0] if len(values) == 1 else None


def _statements(text: str, chains: Sequence[Chain], names: dict[str, Fraction]) -> Iterator[Statement]:
    """The statements of the chains in order; letters that they define are put into `names` as they are read."""
    for chain in chains:
        for left, right, approximate in zip(chain.sides, chain.sides[1:], chain.approximate, strict=False):
            statement = _statement(text, left, right, names, approximate=approximate) if left and right else None
            if statement:
                yield statement
        first, last = chain.sides[0], chain.sides[-1]
        if len(chain.sides) > 1 and first and last and first.pieces[0].isupper() and first.lone:
            known = value(last, names)
            names.update({first.pieces[0]: known} if known is not None else {})


def _statement(text: str, left: Side, right: Side, names: Mapping[str, Fraction], *, approximate: bool) -> Statement | None:
    values = value(left, names), value(right, names)
    if not _states(left, right) or values[0] is None or values[1] is None:
        return None
    holds = _equal(left, right, names, approximate=approximate)
    if not holds and _other_reading(left, right, (values[0], values[1])):
        return None
    return Statement(
        start=left.start, end=right.end, text=text[left.start : right.end], expression=left.expression,
        left=values[0], right=values[1], holds=holds,
    )  # fmt: skip


def value(side: Side, names: Mapping[str, Fraction], percent: Fraction = _HUNDREDTH) -> Fraction | None:
    """The exact value; None when it is too large, divides by zero, or uses a name without a value."""
    if len(side.pieces) > MAX_PIECES or not side.names <= names.keys() or any(len(n) > MAX_BITS // 4 for n in side.numbers):
        return None
    numbers = {f"n{index}": Fraction(number) for index, number in enumerate(side.numbers)}
    tree = ast.parse(" ".join(side.pieces), mode="eval")
    try:
        return _evaluate(tree.body, {**names, **numbers, "percent": percent})
    except (ZeroDivisionError, _Unbounded):
        return None


def _evaluate(node: ast.expr, values: Mapping[str, Fraction]) -> Fraction:
    match node:
        case ast.Name():
            return values[node.id]
        case ast.UnaryOp():
            result = _evaluate(node.operand, values)
            return -result if isinstance(node.op, ast.USub) else result
        case ast.BinOp(op=ast.Pow()):
            return _power(_evaluate(node.left, values), _evaluate(node.right, values))
        case ast.BinOp():
            return _bounded(_OPERATORS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values)))
    raise AssertionError(f"the reader made {ast.dump(node)}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent.numerator) > MAX_BITS:
        raise _Unbounded
    return Fraction(base ** int(exponent))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise _Unbounded
    return number


def _states(left: Side, right: Side) -> bool:
    """There is something to compute, and the left side is not a measure (5 days = 5 * 24) or a label (week 2 = 3 + 4)."""
    if left.lone and right.lone:
        return False
    return not (left.lone and (left.units or (left.labelled and not left.names)))


def _equal(left: Side, right: Side, names: Mapping[str, Fraction], *, approximate: bool) -> bool:
    """Within the rounding of either side, and under either reading of percent: 0.7 * 100 = 70%."""
    tolerance = max(_last_place(left, approximate), _last_place(right, approximate))
    readings = (_HUNDREDTH, Fraction(1)) if "%" in left.units | right.units else (_HUNDREDTH,)
    lefts, rights = ([value(side, names, percent) for percent in readings] for side in (left, right))
    differences = [abs(a - b) for a, b in product(lefts, rights) if a is not None and b is not None]
    return any(difference < tolerance or not difference for difference in differences)


def _last_place(side: Side, approximate: bool) -> Fraction:
    """One unit of the last place of a lone decimal, of the last digit that is not 0 for an approximate integer; else 0."""
    if not side.lone or not side.numbers:
        return Fraction(0)
    whole, _, decimals = side.numbers[0].partition(".")
    if decimals:
        return Fraction(1, 10 ** len(decimals))
    return Fraction(10 ** (len(whole) - len(whole.rstrip("0")))) if approximate else Fraction(0)


def _other_reading(left: Side, right: Side, values: tuple[Fraction, Fraction]) -> bool:
    """Whether an equality that does not hold may mean something else, so that it is not counted.

    A run-on calculation (2 + 3 = 5 * 4 = 20), a quotient in whole things (100 / 3 = 33 stickers), or another unit of the same
    dimension (2 * 30 minutes = 1 hour).
    """
    return _runs_on(right, values[0]) or _is_whole_part(left, right, values) or _converts(left.units, right.units)


def _runs_on(right: Side, left_value: Fraction) -> bool:
    first = right.pieces[: 2 if right.pieces[0] == "-" else 1]
    return not right.lone and first[-1].startswith("n") and Fraction("".join(first[:-1]) + right.numbers[0]) == left_value


def _is_whole_part(left: Side, right: Side, values: tuple[Fraction, Fraction]) -> bool:
    quotient = "/" in left.pieces or ")/(" in left.pieces
    whole = right.lone and not any("." in number for number in right.numbers)
    return quotient and whole and values[0].denominator != 1 and abs(values[0] - values[1]) < 1


def _converts(left: frozenset[str], right: frozenset[str]) -> bool:
    """A unit on the right is of the dimension of one on the left, which has not that unit; dozens convert to anything."""
    for units in DIMENSIONS:
        on_left, on_right = (({unit.rstrip("s") for unit in side} | side) & units for side in (left, right))
        if on_left and on_right and not on_right <= on_left:
            return True
    return bool(MULTIPLES & (left ^ right))
