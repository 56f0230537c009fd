"""Chains of equalities in free text, read in one pass: plain, LaTeX and markdown, with units, money and percent.

A chain is what stands between equality signs: "a = b = c" has three sides. Text is untrusted: it is cut into tokens by one
regular expression, and each token is looked at once, so that time is linear in the length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

MAX_UNIT_WORDS = 4
"""Words that may stand between a number and the operator or equality sign after it: "5 miles per hour * 2"."""

_TOKEN = re.compile(
    r"""
    (?P<thousands>\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)(?:\.\d+)?)
  | (?P<opaque>\d+(?:[:,]\d+)+|(?:\.\s?){3,}|\u2026|\\[lc]?dots|(?<=[\d)])!)
  | (?P<number>\d+(?:\.\d+)?|\.\d+)
  | (?P<skip>[^\S\n]+|\\[,;! ()]|\\(?:left|right|displaystyle|boxed|mathbf|bf|q?quad)(?![a-z])|[`~&'\u2019]
      |\n(?=[^\S\n]*&?=)|\\\\\s*(?=&?\s*=)|(?<![\d)])\*\*|\*\*(?![\d(]))
  | (?P<word>\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}
      |(?:(?<=\d)-|/)?[^\W\d_](?:[^\W\d_]|['\u2019-](?=[^\W\d_]))*)
  | (?P<frac>\\[dt]?frac(?=\s*\{))
  | (?P<separator>\n|\\\\|\\[\[\]]|\\(?:[lg]eq?|neq?|implies|Rightarrow|rightarrow|to)(?![a-z])
      |=+>|->|!=|[<>\u2260\u2264\u2265\u2192]=?
      |[,.;:!?"\u201c\u201d\u2014])
  | (?P<operator>\\(?:times|cdot|div)(?![a-z])|\*\*|[-+*/^\u00d7\u00b7\u22c5\u2217\u00f7\u2212\u2013])
  | (?P<relation>\\approx|\u2248|==?(?![=>]))
  | (?P<percent>\\?%)
  | (?P<money>\\?[$\u20ac\u00a3])
  | (?P<open>[({]|\[(?!\s*\\))
  | (?P<close>[)}\]])
  | (?P<unknown>\\[A-Za-z]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_OPERATORS = {
    "\\times": "*", "\\cdot": "*", "\\div": "/", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\u2217": "*", "\u00f7": "/",
    "\u2212": "-", "\u2013": "-", "^": "**", "plus": "+", "minus": "-", "times": "*", "x": "*", "X": "*",
}  # fmt: skip
_WORDS_AS_SIGNS = {"plus": "operator", "minus": "operator", "times": "operator", "percent": "percent", "equals": "relation"}
ATTACHED_UNITS = frozenset({"mm", "cm", "km", "mg", "kg", "ml", "lb", "lbs", "oz", "ft", "mph", "hours", "minutes"})
"""What may follow a number without a space, and is no product of unknowns."""
_NUMBER_ENDINGS = {"st", "nd", "rd", "th"}
_CONNECTIVES = {"and", "or", "but", "so", "because", "since", "if", "when", "then", "which", "that", "is", "are", "was", "were"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of an equality, as it was read.

    Example: the left side of "2 apples + 3 = 5" has pieces ("n0", "+", "n1"), numbers ("2", "3") and units {"apples"}
    """

    pieces: tuple[str, ...]
    """A Python expression over n0, n1, ... (the numbers), percent, and names, which are single capital letters."""
    numbers: tuple[str, ...]
    """Decimal literals without separators of thousands."""
    units: frozenset[str]
    """Words and signs beside the numbers, in lower case; "%" and "$" among them."""
    labelled: bool
    """A word stands right before it: "week 2 = 3 + 4" is about the second week."""
    start: int
    """Offset of the side in the text, in characters."""
    end: int

    @property
    def lone(self) -> bool:
        """A number or name without an operator, signs, parentheses and percent aside."""
        return len([piece for piece in self.pieces if piece not in ("(", ")", "-", "+", "*", "percent")]) == 1

    @property
    def expression(self) -> str:
        """It in plain signs: "2 + 3"."""
        numbers = {f"n{index}": number for index, number in enumerate(self.numbers)}
        return " ".join(numbers.get(piece, piece) for piece in self.pieces)

    @property
    def names(self) -> frozenset[str]:
        """The single capital letters that it uses."""
        return frozenset(piece for piece in self.pieces if piece.isupper())


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The sides of successive equalities; None is a side that could not be read as an expression.

    Example: "x = 2 + 3 = 5" has sides (None, 2 + 3, 5) and approximate (False, False)
    """

    sides: tuple[Side | None, ...]
    approximate: tuple[bool, ...]
    """Of each sign between two sides: whether it says about equal."""


def read_chains(text: str) -> list[Chain]:
    """Every chain of the text in order, also those of one side (a number, an expression), which state nothing."""
    tokens = [_token(match) for match in _TOKEN.finditer(text)]
    content = [token.kind in ("number", "relation") or _is_name(token.text) for token in tokens]
    words = [token.kind == "word" for token in tokens]
    return _Reader(
        tokens=tokens, closings=_closings(tokens),
        content_before=list(accumulate(content, initial=0)), words_before=list(accumulate(words, initial=0)),
    ).read()  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def _token(match: re.Match[str]) -> _Token:
    text, kind = match.group(), str(match.lastgroup)
    kind = "number" if kind == "thousands" else _WORDS_AS_SIGNS.get(text, kind)
    return _Token(kind, text, match.start(), match.end())


def _is_name(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text.isupper()


def _closings(tokens: Sequence[_Token]) -> dict[int, int]:
    """Index of the closing parenthesis of each opening one, where there is one before the next separator of lines."""
    found: dict[int, int] = {}
    stack: list[int] = []
    for index, token in enumerate(tokens):
        if token.kind == "open":
            stack.append(index)
        elif token.kind == "close" and stack:
            found[stack.pop()] = index
        elif token.text == "\n":
            stack.clear()
    return found


@dataclass(slots=True)
class _Reader:
    """A state machine over tokens: it expects an operand or, after one, an operator, and tells expressions from prose.

    A side starts at the first operand after prose. It is unreadable (None) when an operator before it has an operand that
    is not a number, as in "x + 3 = 5", or when it breaks off after an operator or inside parentheses.
    """

    tokens: Sequence[_Token]
    closings: Mapping[int, int]
    content_before: Sequence[int]
    """Of each token: how many numbers, names and signs of equality stand before it."""
    words_before: Sequence[int]
    """Of each token: how many words stand before it."""
    chains: list[Chain] = field(default_factory=list)
    sides: list[Side | None] = field(default_factory=list)
    approximate: list[bool] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    units: set[str] = field(default_factory=set)
    stack: list[tuple[str, int, int]] = field(default_factory=list)
    """Open parentheses: what they are ("(", "numerator", "denominator"), the number of pieces before and the offset after."""
    start: int = 0
    end: int = 0
    words: int = 0
    """Words since the last operand."""
    operand: bool = False
    """The last piece ends an operand."""
    tainted: bool = False
    """What comes is the rest of an expression that cannot be read."""
    labelled: bool = False
    """The last thing before the side was a word."""
    fresh: bool = True
    """Nothing but signs since the last separator: a dash or a star is a bullet here."""
    fraction: str = ""
    """The part of a LaTeX fraction that has to open next."""

    def read(self) -> list[Chain]:
        handlers: Mapping[str, Callable[[int, _Token], int | None]] = {
            "number": self._number, "word": self._word, "operator": self._operator, "relation": self._relation,
            "percent": self._percent, "money": self._money, "open": self._open, "close": self._close, "frac": self._frac,
            "separator": self._separator, "unknown": self._unknown, "opaque": self._unknown,
        }  # fmt: skip
        index = 0
        while index < len(self.tokens):
            token = self.tokens[index]
            if self.fraction and token.kind not in ("open", "skip"):
                self._unknown(index, token)
            skip_to = handlers[token.kind](index, token) if token.kind != "skip" else None
            index = skip_to if skip_to is not None else index + 1
        self._end_chain()
        return self.chains

    def _add(self, piece: str, token: _Token, *, operand: bool) -> None:
        if not self.pieces:
            self.start = token.start
        self.pieces.append(piece)
        self.end = token.end
        self.operand, self.words, self.fresh = operand, 0, False

    def _number(self, index: int, token: _Token) -> None:
        if self.operand and self.words:
            self._end_chain()
        elif self.operand:
            self._unreadable()  # 2 1/2
        elif self._tight_divisor(index):
            self.pieces.insert(-2, "(")
            self._append_number(token)
            self._add(")", token, operand=True)
            return
        self._append_number(token)

    def _tight_divisor(self, index: int) -> bool:
        """The 3 of 25 / 1/3, which is 25 / (1/3)."""
        kinds = [before.kind for before in self.tokens[max(index - 3, 0) : index]]
        return kinds == ["skip", "number", "operator"] and self.pieces[-3:-2] == ["/"] and self.pieces[-1:] == ["/"]

    def _append_number(self, token: _Token) -> None:
        self.numbers.append(token.text.replace("{,}", "").replace(",", ""))
        self._add(f"n{len(self.numbers) - 1}", token, operand=True)

    def _word(self, index: int, token: _Token) -> None:
        word = token.text
        if self.operand and word in ("x", "X") and self._next(index).kind in ("number", "money", "open"):
            self._operator(index, token)
        elif word == "of" and self._is_share():
            self._add("*", token, operand=False)
        elif self.operand:
            self._word_after_operand(index, word.lower().strip("-/"))
        elif _is_name(word):
            self._add(word, token, operand=True)
        else:
            self._unreadable() if len(word) == 1 and word != "a" else self._end_chain()
            self.fresh, self.labelled = False, True

    def _word_after_operand(self, index: int, word: str) -> None:
        attached = self.tokens[index - 1].kind in ("number", "close") and self.tokens[index].text[0] not in "-/"
        letters = attached and word not in ATTACHED_UNITS and word not in _NUMBER_ENDINGS  # 2x, 3ab
        mixed = word == "and" and not self.words and self._next(index).kind == "number"  # 1 and 1/2
        if letters or mixed or (len(word) == 1 and word != "a"):
            self._unreadable()
        elif word in _CONNECTIVES or word in _NUMBER_ENDINGS or self.words == MAX_UNIT_WORDS:
            self._end_chain()
        else:
            self.words += 1
            self.units.add(word)

    def _is_share(self) -> bool:
        """1/3 or 20%, right before this."""
        share = "percent" in self.pieces[-2:] or self.pieces[-1:] == ["))"] or self.pieces[-2:-1] == ["/"]
        return self.operand and not self.words and share

    def _next(self, index: int) -> _Token:
        following = (token for token in self.tokens[index + 1 : index + 4] if token.kind != "skip")
        return next(following, _Token("separator", "", 0, 0))

    def _operator(self, index: int, token: _Token) -> None:
        sign = _OPERATORS.get(token.text, token.text)
        exponent_of_unit = sign == "**" and self.words  # 5 cm^2
        if self._is_unary(index, sign) if not self.operand else not exponent_of_unit:
            self._add(sign, token, operand=False)
        elif self.pieces:
            self._unreadable()
        else:
            self.tainted |= not self.fresh

    def _is_unary(self, index: int, sign: str) -> bool:
        if self.pieces:
            return sign == "-"
        return sign in ("-", "+") and (bool(self.sides) or self._is_sign(index))

    def _is_sign(self, index: int) -> bool:
        """A minus or plus that stands apart from what is before and touches what follows."""
        before = self.tokens[index - 1].kind if index else "skip"
        following = self.tokens[index + 1].kind if index + 1 < len(self.tokens) else "separator"
        return before in ("skip", "open", "separator", "money") and following in ("number", "open", "money", "frac")

    def _percent(self, index: int, token: _Token) -> None:
        if self.operand and not self.words and "percent" not in self.pieces[-2:]:
            self.units.add("%")
            last = self.pieces.pop()
            self.pieces += ["(", last, "*", "percent", ")"] if last.startswith("n") else [last, "*", "percent"]
            self.end = token.end

    def _money(self, index: int, token: _Token) -> None:
        self.units.add("$")

    def _frac(self, index: int, token: _Token) -> None:
        if self.operand:
            self._unreadable()  # 2\\frac{1}{2} is a sum or a product
        self._add("((", token, operand=False)
        self.fraction = "numerator"

    def _open(self, index: int, token: _Token) -> int | None:
        kind, self.fraction = self.fraction or "(", ""
        closing = self.closings.get(index, index)
        attached = index > 0 and self.tokens[index - 1].kind in ("number", "close")
        if index and self.tokens[index - 1].kind == "word":  # f(2)
            self._unreadable()
        if kind == "(" and closing > index and self.content_before[closing] == self.content_before[index]:
            self._comment(attached=attached)
            return closing + 1
        if kind == "(" and self.operand:
            if not self.words and self.words_before[closing] == self.words_before[index]:
                self._add("*", token, operand=False)  # 2(3 + 4)
            else:
                self._unreadable() if attached else self._end_chain()
        self.stack.append((kind, len(self.pieces), token.end))
        if kind == "(":
            self._add("(", token, operand=False)
        return None

    def _comment(self, *, attached: bool) -> None:
        """A parenthesis without numbers: after an operand it is passed over, "4 pounds (French)", but not "4(pounds)"."""
        if attached if self.operand else (self.pieces or self.sides):
            self._unreadable()
        self.fresh = False

    def _close(self, index: int, token: _Token) -> None:
        if not self.stack and token.text != "}":
            self._end_chain()
        elif not self.operand or not self.stack:
            self._unreadable()
        else:
            kind = self.stack.pop()[0]
            self._add({"(": ")", "numerator": ")/(", "denominator": "))"}[kind], token, operand=kind != "numerator")
            self.fraction = "denominator" if kind == "numerator" else ""

    def _relation(self, index: int, token: _Token) -> None:
        if self.operand and self.stack and self.stack[-1][0] == "(":  # (2 + 3 = 5) in prose
            _, before, self.start = self.stack.pop()
            inside, self.pieces, self.stack = self.pieces[before + 1 :], [], []
            self.sides.append(None)
            self.chains += self._chain()
            self.sides, self.approximate, self.pieces = [], [], inside
        self._end_side()
        self.approximate.append(token.text in ("\\approx", "\u2248"))
        self.tainted = False

    def _separator(self, index: int, token: _Token) -> None:
        self._end_chain()
        self.fresh = True

    def _unknown(self, index: int, token: _Token) -> None:
        self._unreadable()

    def _unreadable(self) -> None:
        """Give up the side, and what follows it up to the next sign of equality or separator."""
        self.operand = False
        self._end_chain()
        self.tainted = True

    def _end_side(self) -> None:
        readable = self.operand and not self.tainted and not self.stack and not self.fraction
        self.sides.append(
            Side(
                pieces=tuple(self.pieces), numbers=tuple(self.numbers), units=frozenset(self.units),
                labelled=self.labelled, start=self.start, end=self.end,
            ) if readable else None
        )  # fmt: skip
        self.pieces, self.numbers, self.units, self.stack = [], [], set(), []
        self.words, self.operand, self.fraction, self.fresh, self.labelled = 0, False, "", False, False

    def _end_chain(self) -> None:
        self._end_side()
        self.chains += self._chain()
        self.sides, self.approximate, self.tainted = [], [], False

    def _chain(self) -> list[Chain]:
        return [Chain(sides=tuple(self.sides), approximate=tuple(self.approximate))] if any(self.sides) else []
