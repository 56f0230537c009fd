"""Planning puzzles of reasoning-gym in the alphabet of the tiny model: question, answer, habit and a mark a character.

Both are grids, written row by row with a mark before each row: a model whose positions are relative reads off the
nearest mark which row and column a cell is in. An answer has a character for each of the question's, so that its length
tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mas_hpc.types import Task

_ROW_MARKS = "*/?$"


class Puzzle(Protocol):
    """What the tiny model's dialect needs to know of one data set."""

    symbols: str
    """What the cells of an answer are written with."""

    def texts(self, task: Task) -> tuple[str, str]:
        """The question and the reference answer in the tiny model's alphabet, read from the library's texts."""
        ...

    def text_for_scorer(self, task: Task, cells: str) -> str | None:
        """The cells of an answer, as many as the question's, in the library's own form; None if they have no meaning."""
        ...

    def marks(self, task: Task, answer: str) -> str:
        """`=` or `!` for each cell, by rules that look only at related cells; row marks stay."""
        ...

    def habit(self, task: Task) -> str:
        """The answer of a solver that leaves out part of the rules; right for some questions."""
        ...


def with_compact(task: Task) -> Task:
    """The task with `compact` and `compact_answer` if its data set has them, else unchanged."""
    puzzle = puzzle_of(task)
    if puzzle is None:
        return task
    compact, compact_answer = puzzle.texts(task)
    return replace(task, compact=compact, compact_answer=compact_answer)


def text_for_scorer(task: Task, answer: str) -> str:
    """What the library's scorer reads: a compact answer translated, any other text as it is."""
    puzzle, cells = puzzle_of(task), _cells(answer)
    if puzzle is None or not task.compact or not set(cells) <= set(puzzle.symbols):
        return answer
    if answer != _framed(cells, _width(task.compact)) or len(answer) != len(task.compact):
        return answer
    return puzzle.text_for_scorer(task, cells) or answer


def puzzle_of(task: Task) -> Puzzle | None:
    """The puzzle that a task of reasoning-gym belongs to, by its id; None for other data sets."""
    return PUZZLES.get(task.id.split("/")[1])


class MiniSudoku:
    """4x4 Sudoku: digits row by row, 0 for an empty cell; exactly one answer is right.

    Example: the rows `1 _ 3 4`, `3 4 1 2`, `2 1 4 3`, `4 3 2 _` are compact="*1034/3412?2143$4320", and the answer is
    "*1234/3412?2143$4321".
    """

    symbols = "1234"

    def texts(self, task: Task) -> tuple[str, str]:
        """The digits of the puzzle and of its solution."""
        rows = re.findall(r"^[1-4_](?: [1-4_]){3}$", task.question, re.MULTILINE)
        given = "".join(rows).replace(" ", "").replace("_", "0")
        return _framed(given, 4), _framed("".join(task.answer.split()), 4)

    def text_for_scorer(self, task: Task, cells: str) -> str | None:
        """Four lines of four digits."""
        return "\n".join(" ".join(cells[row : row + 4]) for row in range(0, 16, 4))

    def marks(self, task: Task, answer: str) -> str:
        """`!` where a given digit was changed, or the digit is again in the cell's row, column or 2x2 box."""
        digits = _cells(answer)
        marks = (
            "!" if given not in ("0", digit) or digit in (digits[peer] for peer in _PEERS[place]) else "="
            for place, (given, digit) in enumerate(zip(_cells(task.compact), digits, strict=True))
        )
        return _framed("".join(marks), 4)

    def habit(self, task: Task) -> str:
        """Looks at rows only: the digits that a row misses, in rising order."""
        given = _cells(task.compact)
        return _framed("".join(_fill(given[row : row + 4]) for row in range(0, 16, 4)), 4)


def _fill(row: str) -> str:
    missing = iter(sorted(set("1234") - set(row)))
    return "".join(next(missing) if digit == "0" else digit for digit in row)


def _share_a_unit(a: int, b: int) -> bool:
    (row, column), (other_row, other_column) = divmod(a, 4), divmod(b, 4)
    same_box = (row // 2, column // 2) == (other_row // 2, other_column // 2)
    return row == other_row or column == other_column or same_box


_PEERS = tuple(tuple(other for other in range(16) if other != place and _share_a_unit(place, other)) for place in range(16))


class ShortestPath:
    """A way through a grid: cells row by row as 0 open, 1 blocked, 5 start, 9 goal.

    The answer is a map of the way: each cell that is left holds the move as on a numeric keypad (8 up, 2 down, 4 left,
    6 right), every other cell a dot; a map of dots says that there is no way. Any shortest way is right.
    Example: the rows `* X #`, `O O O` are compact="*519/000", and "down right right up" is the answer "*2../668".
    """

    symbols = ".2468"

    def texts(self, task: Task) -> tuple[str, str]:
        """The cells, and the map of the library's way."""
        rows = re.findall(r"^[*#OX](?: [*#OX])*$", task.question, re.MULTILINE)
        grid = "".join(rows).replace(" ", "").translate(str.maketrans("OX*#", "0159"))
        compact = _framed(grid, (len(rows[0]) + 1) // 2)
        moves = [] if task.answer == "infeasible" else task.answer.split()
        return compact, _way_map(compact, [_KEYS[move] for move in moves])

    def text_for_scorer(self, task: Task, cells: str) -> str | None:
        """The moves from the start on, if they are all that the map holds; "infeasible" for a map of dots."""
        place: int | None = _cells(task.compact).index("5")
        num_moves, moves = len(cells) - cells.count("."), list[str]()
        while place is not None and cells[place] != "." and len(moves) < num_moves:
            moves.append(_MOVES[cells[place]][0])
            place = _neighbour(place, cells[place], _width(task.compact), len(cells))
        return (" ".join(moves) or "infeasible") if len(moves) == num_moves else None

    def marks(self, task: Task, answer: str) -> str:
        """`!` where a move stands on a blocked cell, on the goal or on a cell that no move leads to, or leads out of the grid
        or to a cell that is neither left nor the goal; and at a start that is not left though there is a way."""
        grid, cells, width = _cells(task.compact), _cells(answer), _width(task.compact)
        after = [_neighbour(place, move, width, len(cells)) for place, move in enumerate(cells)]

        def holds(place: int) -> bool:
            if cells[place] == ".":
                return grid[place] != "5" or task.answer == "infeasible"
            entered = grid[place] == "5" or (grid[place] == "0" and place in after)
            following = after[place]
            return entered and following is not None and (cells[following] != ".") != (grid[following] == "9")

        return _framed("".join("=" if holds(place) else "!" for place in range(len(cells))), width)

    def habit(self, task: Task) -> str:
        """Looks at start and goal only: sideways, then up or down, as if no cell were blocked."""
        grid, width = _cells(task.compact), _width(task.compact)
        (row, column), (goal_row, goal_column) = (divmod(grid.index(cell), width) for cell in "59")
        sideways = ("6" if goal_column > column else "4") * abs(goal_column - column)
        return _way_map(task.compact, sideways + ("2" if goal_row > row else "8") * abs(goal_row - row))


_MOVES = {"6": ("right", 0, 1), "2": ("down", 1, 0), "4": ("left", 0, -1), "8": ("up", -1, 0)}
"""Keypad digit: (the library's word, rows, columns)."""
_KEYS = {word: key for key, (word, _, _) in _MOVES.items()}


def _neighbour(place: int, move: str, width: int, num_cells: int) -> int | None:
    """Where a move leads; None for out of the grid, or no move."""
    if move == ".":
        return None
    _, rows, columns = _MOVES[move]
    row, column = place // width + rows, place % width + columns
    return row * width + column if 0 <= column < width and 0 <= row < num_cells // width else None


def _way_map(compact: str, moves: Sequence[str]) -> str:
    grid, width = _cells(compact), _width(compact)
    cells, place = ["."] * len(grid), grid.index("5")
    for move in moves:
        following = _neighbour(place, move, width, len(grid))
        assert following is not None
        cells[place], place = move, following
    return _framed("".join(cells), width)


def _framed(cells: str, width: int) -> str:
    """The rows, each after its mark."""
    rows = range(0, len(cells), width)
    return "".join(_ROW_MARKS[row // width % len(_ROW_MARKS)] + cells[row : row + width] for row in rows)


def _cells(text: str) -> str:
    return text.translate(str.maketrans("", "", _ROW_MARKS))


def _width(compact: str) -> int:
    """Cells of a row: one row has no second mark."""
    return (compact + _ROW_MARKS[1]).index(_ROW_MARKS[1]) - 1


PUZZLES: dict[str, Puzzle] = {"mini_sudoku": MiniSudoku(), "shortest_path": ShortestPath()}
"""By the library's name of the data set."""
