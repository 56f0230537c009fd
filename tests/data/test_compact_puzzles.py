"""Puzzles in the tiny model's alphabet: forms written out by hand, and the library's own generators and scorers."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.config import ReasoningGymConfig
from mas_hpc.data.compact_puzzles import PUZZLES, text_for_scorer, with_compact
from mas_hpc.data.tasks import load_tasks
from mas_hpc.errors import ConfigError
from mas_hpc.evaluation.graders import grade
from mas_hpc.models.load import ALPHABET
from mas_hpc.types import Task

GRIDS = {"min_rows": 3, "max_rows": 3, "min_cols": 4, "max_cols": 4}


def sudoku() -> Task:
    question = "Solve this 4x4 Mini Sudoku puzzle:\n1 _ 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 _\nFormat your response"
    return with_compact(
        Task(id="reasoning_gym/mini_sudoku/0/4/0", question=question, answer="1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1")
    )


def path(*rows: str, answer: str) -> Task:
    question = "- *: your starting point\n- O: an open cell\n\nin the following grid:\n" + "\n".join(map(" ".join, rows)) + "\n"
    return with_compact(Task(id="reasoning_gym/shortest_path/0/4/0", question=question, answer=answer))


def test_a_sudoku_is_written_row_by_row_each_after_its_mark():
    task = sudoku()
    assert task.compact == "*1034/3412?2143$4320"
    assert task.compact_answer == "*1234/3412?2143$4321"
    assert text_for_scorer(task, task.compact_answer) == task.answer


def test_a_way_is_a_map_with_a_move_in_each_cell_that_is_left():
    task = path("*X#", "OOO", answer="down right right up")
    assert task.compact == "*519/000"
    assert task.compact_answer == "*2../668"
    assert text_for_scorer(task, task.compact_answer) == task.answer


def test_a_grid_of_one_row_and_a_goal_that_cannot_be_reached():
    assert path("#O*", answer="left left").compact_answer == "*.44"
    task = path("#X*", answer="infeasible")
    assert task.compact_answer == "*..."
    assert text_for_scorer(task, "*...") == "infeasible"


@pytest.mark.parametrize(
    "answer",
    [
        "*2../66.",  # stops before the goal: the moves that there are
        "*2.6/668",  # a move off the way
        "*4../668",  # out of the grid
        "*64./...",  # to and fro for ever
        "2../668",  # without a row mark
        "/2..*668",  # row marks exchanged
        "*2../6681",
        "",
    ],
)
def test_maps_that_are_not_the_way_are_never_read_as_it(answer):
    assert text_for_scorer(path("*X#", "OOO", answer="down right right up"), answer) != "down right right up"


@given(st.text(alphabet=".2468", min_size=6, max_size=6))
def test_what_is_read_of_a_map_is_all_its_moves_and_every_map_can_be_marked(cells):
    task, answer = path("*X#", "OOO", answer="down right right up"), f"*{cells[:3]}/{cells[3:]}"
    text = text_for_scorer(task, answer)
    moves = [] if text == "infeasible" else text.split()
    assert text == answer or len(moves) == 6 - cells.count(".")
    assert len(PUZZLES["shortest_path"].marks(task, answer)) == len(answer)


@given(st.text(alphabet=ALPHABET, max_size=24))
def test_text_without_the_grids_form_stays_as_it_is(text):
    for task in (sudoku(), path("*X#", "OOO", answer="down right right up")):
        assert text_for_scorer(task, text) == text or len(text) == len(task.compact)


def test_marks_of_a_sudoku_show_changed_givens_and_repeated_digits():
    rules, task = PUZZLES["mini_sudoku"], sudoku()
    assert rules.marks(task, "*1234/3412?2143$4321") == "*====/====?====$===="
    # a last 2 meets the 2s of its row, its column and (the same one as in its row) its box
    assert rules.marks(task, "*1234/3412?2143$4322") == "*====/===!?====$==!!"
    # all ones and twos exchanged: no digit meets itself, but the givens are changed and the two free cells are not
    assert rules.marks(task, "*2134/3421?1243$4312") == "*!===/==!!?!!==$==!="


def test_marks_of_a_way_show_moves_that_cannot_be_made():
    rules, task = PUZZLES["shortest_path"], path("*X#", "OOO", answer="down right right up")
    marked = {
        "*2../668": "*===/===",
        "*66./...": "*=!=/===",  # the second move stands on a blocked cell
        "*.../668": "*!==/!==",  # the start is not left, so nothing leads to the next cell
        "*2../66.": "*===/=!=",  # the second move leads to a cell that is not left
        "*2../626": "*===/=!!",  # down and right out of the grid
        "*2.2/668": "*==!/==!",  # the goal is left
        "*2../468": "*===/!!=",  # the first move meets the wall, so nothing leads to the second, and the third stays
    }
    assert {answer: rules.marks(task, answer) for answer in marked} == marked


def test_habits_see_rows_only_and_no_walls():
    assert PUZZLES["mini_sudoku"].habit(sudoku()) == "*1234/3412?2143$4321"
    emptied = sudoku().question.replace("3 4 1 2", "_ 4 _ 2")
    assert PUZZLES["mini_sudoku"].habit(with_compact(Task(id=sudoku().id, question=emptied, answer="")))[5:10] == "/1432"
    assert PUZZLES["shortest_path"].habit(path("*X#", "OOO", answer="down right right up")) == "*66./..."
    assert PUZZLES["shortest_path"].habit(path("#OO", "OX*", answer="up left left")) == "*.../844"


@pytest.mark.parametrize(("name", "settings"), [("mini_sudoku", {}), ("shortest_path", {}), ("shortest_path", GRIDS)])
def test_every_question_of_the_library_has_a_form_whose_reference_is_right_and_without_a_wrong_mark(name, settings):
    train, test = load_tasks(ReasoningGymConfig(name=name, settings=settings, num_train=30, num_test=10))
    for task in train + test:
        assert set(task.compact + task.compact_answer) <= set(ALPHABET)
        assert len(task.compact) == len(task.compact_answer)
        assert grade(task, task.compact_answer) and grade(task, task.answer)
        assert "!" not in PUZZLES[name].marks(task, task.compact_answer)


@pytest.mark.parametrize("name", ["mini_sudoku", "shortest_path"])
def test_a_habit_with_a_wrong_mark_is_wrong_and_habits_are_sometimes_right(name):
    train, _ = load_tasks(
        ReasoningGymConfig(
            name=name, settings={"shortest_path": GRIDS}.get(name, {"min_empty": 4, "max_empty": 6}), num_train=60, num_test=1
        )
    )
    right = [grade(task, PUZZLES[name].habit(task)) for task in train]
    assert right == ["!" not in PUZZLES[name].marks(task, PUZZLES[name].habit(task)) for task in train]
    assert 0 < sum(right) < 60


def test_exactly_the_shortest_ways_are_right():
    """All maps of a 2 x 2 grid; two ways of two moves lead to the opposite corner."""
    train, _ = load_tasks(
        ReasoningGymConfig(
            name="shortest_path", settings=dict.fromkeys(GRIDS, 2) | {"p_blocked": 0.0}, num_train=11, num_test=1
        )
    )
    task = next(task for task in train if task.compact == "*50/09")
    maps = ["*{}{}/{}{}".format(*cells) for cells in product(".2468", repeat=4)]
    assert [text for text in maps if grade(task, text)] == ["*2./6.", "*62/.."]
    # cells' marks cannot see that a way runs in a circle
    marked = {text for text in maps if "!" not in PUZZLES["shortest_path"].marks(task, text)}
    assert marked == {"*2./6.", "*62/..", "*64/..", "*2./8."}


def test_settings_are_the_librarys_own_and_part_of_the_id():
    (task,), _ = load_tasks(
        ReasoningGymConfig(name="shortest_path", settings={"p_blocked": 0.25, **GRIDS}, num_train=1, num_test=1)
    )
    assert task.id == "reasoning_gym/shortest_path/max_cols=4/max_rows=3/min_cols=4/min_rows=3/p_blocked=0.25/0/8/1"
    assert len(task.compact) == 3 * 5
    (plain,), _ = load_tasks(ReasoningGymConfig(name="chain_sum", num_train=1, num_test=1))
    assert (plain.id, plain.compact, plain.compact_answer) == ("reasoning_gym/chain_sum/0/8/1", "", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_emty": 4}, r"data.settings.min_emty: mini_sudoku has no such .* expected one of \['max_empty', 'min_empty'\]"),
        ({"seed": 4}, "data.settings.seed: .* expected one of"),
        ({"min_empty": 4.5}, "data.settings.min_empty=4.5: mini_sudoku expects a whole number"),
        ({"min_empty": 13}, "refuses them: min_empty must be between 0 and 12"),
    ],
)
def test_settings_that_the_library_does_not_have_name_those_that_it_has(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_tasks(ReasoningGymConfig(name="mini_sudoku", settings=settings, num_train=1, num_test=1))
