"""Warm-start transcripts: true verdicts, planted errors that nobody learns, and the demonstrator's habit."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from mas_hpc.config import ReasoningGymConfig
from mas_hpc.data.compact_puzzles import MiniSudoku
from mas_hpc.data.tasks import load_tasks
from mas_hpc.evaluation.graders import grade
from mas_hpc.orchestration.demonstrate import demonstrate, plant
from mas_hpc.orchestration.demonstrators import PlanningDemonstrator, ReferenceDemonstrator, RingDemonstrator
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.types import Task


@pytest.fixture
def ring() -> Task:
    """x = 1, 2, 3, 0, 1, 2, 3 modulo 4 with its sums."""
    digits = [1, 2, 3, 0, 1, 2, 3]
    sums = [(a + b) % 4 for a, b in zip(digits, [*digits[1:], digits[0]], strict=True)]
    return Task(id="r", question="modulo 4", answer="1230123", compact="".join(map(str, sums)), grader="ring")


def texts(samples, tokenizer) -> dict[str, str]:
    return {sample.agent: tokenizer.decode(sample.completion_ids) for sample in samples}


def test_verdicts_mark_every_sum_and_are_true(team: Team, ring: Task, tokenizer) -> None:
    demonstrator = RingDemonstrator(modulus=4, slip_rate=0.5, wrong_rate=0.5)
    for seed in range(50):
        for sample in demonstrate(ring, team, demonstrator, seed):
            if team.agents[sample.agent].role.produces == "verdict":
                prompt = tokenizer.decode(sample.prompt_ids)
                answer = prompt[-9:-2]  # seven digits, the first again, the cue letter
                verdict = tokenizer.decode(sample.completion_ids)
                assert verdict.endswith("+") == grade(ring, answer) == ("!" not in verdict)


def test_without_slips_and_errors_half_of_the_first_digits_work_and_the_next_one_always_does(
    team: Team, ring: Task, tokenizer
) -> None:
    demonstrator = RingDemonstrator(modulus=4, slip_rate=0.0, wrong_rate=0.0)
    found = [texts(demonstrate(ring, team, demonstrator, seed), tokenizer) for seed in range(200)]
    right = sum(grade(ring, episode["solver"]) for episode in found)
    assert 70 < right < 130
    assert all(grade(ring, episode["reviser"]) for episode in found)


def test_the_habit_is_one_too_much_after_a_zero_sum() -> None:
    task = Task(id="r", question="modulo 4", answer="", compact="0" * 7, grader="ring")
    demonstrator = RingDemonstrator(modulus=4, slip_rate=1.0, wrong_rate=0.0)
    # 0 - 1 = 3, and one too much is 0; 0 - 0 = 0 is no borrow, so no slip follows
    assert demonstrator._complete([0] * 7, 1, slips=True) == [1, 0, 0, 0, 0, 0, 0]
    assert demonstrator._complete([0] * 7, 1, slips=False) == [1, 3, 1, 3, 1, 3, 1]
    assert task.compact == "0000000"


def test_planted_errors_are_read_but_not_learnt(team: Team, ring: Task) -> None:
    demonstrator = RingDemonstrator(modulus=4, slip_rate=0.0, wrong_rate=1.0)
    samples = demonstrate(ring, team, demonstrator, 0)
    assert {sample.agent for sample in samples} == {"critic", "verifier"}


@pytest.mark.parametrize("right", [True, False])
def test_planted_answers_are_what_they_should_be(team: Team, ring: Task, right: bool) -> None:
    demonstrator = RingDemonstrator(modulus=4, slip_rate=0.0, wrong_rate=0.0)
    for judge, num_turns in (("critic", 1), ("verifier", 3)):
        path = plant(ring, team, demonstrator, judge, right=right, seed=1)
        assert len(path) == num_turns
        assert grade(ring, path[-1].answer) == right
        assert all(turn.verdict is False for turn in path if turn.verdict is not None)
    assert plant(ring, team, demonstrator, "nobody", right=right, seed=1) == ()


def test_the_reference_demonstrator_writes_solutions_in_words() -> None:
    task = Task(id="g", question="2 x 21?", answer="42", solution="2 x 21 = 42")
    demonstrator = ReferenceDemonstrator(grade=grade, wrong_rate=0.0, compact=False)
    assert demonstrator.answer(task, Random(0), right=True) == "2 x 21 = 42\nThe final answer is \\boxed{42}."
    assert "\\boxed{42}" not in demonstrator.answer(task, Random(0), right=False)


def test_an_accepted_answer_ends_the_episode_if_the_team_says_so(team: Team, ring: Task, tokenizer) -> None:
    topology = Pipeline(agents=tuple(team.agents), stop_when_accepted=True)
    demonstrator = RingDemonstrator(modulus=4, slip_rate=0.0, wrong_rate=0.0)
    for seed in range(20):
        found = texts(demonstrate(ring, replace(team, topology=topology), demonstrator, seed), tokenizer)
        assert ("reviser" in found) == (not grade(ring, found["solver"]))


@pytest.fixture
def sudoku() -> Task:
    """One that rising digits in each row do not solve."""
    (task,), _ = load_tasks(ReasoningGymConfig(name="mini_sudoku", settings={"min_empty": 8}, num_train=1, num_test=1))
    assert not grade(task, MiniSudoku().habit(task))
    return task


def test_planning_verdicts_mark_every_cell_and_are_true(team: Team, sudoku: Task, tokenizer) -> None:
    demonstrator = PlanningDemonstrator(rules=MiniSudoku(), grade=grade, slip_rate=0.3, wrong_rate=0.3)
    judged = []
    for seed in range(50):
        for sample in demonstrate(sudoku, team, demonstrator, seed):
            if team.agents[sample.agent].role.produces == "verdict":
                answer = tokenizer.decode(sample.prompt_ids)[-22:-2]  # twenty characters, the first again, the cue letter
                verdict = tokenizer.decode(sample.completion_ids)
                assert len(verdict) == 21
                assert verdict.endswith("+") == grade(sudoku, answer) == ("!" not in verdict)
                judged.append(verdict[-1])
    assert set(judged) == {"+", "-"}


def test_the_planners_habit_is_learnt_and_its_planted_errors_are_not(team: Team, sudoku: Task, tokenizer) -> None:
    rules = MiniSudoku()
    habitual = PlanningDemonstrator(rules=rules, grade=grade, slip_rate=1.0, wrong_rate=0.0)
    assert texts(demonstrate(sudoku, team, habitual, 0), tokenizer)["solver"] == rules.habit(sudoku)
    planted = PlanningDemonstrator(rules=rules, grade=grade, slip_rate=0.0, wrong_rate=1.0)
    assert not any(sample.agent == "solver" for seed in range(20) for sample in demonstrate(sudoku, team, planted, seed))
    faultless = PlanningDemonstrator(rules=rules, grade=grade, slip_rate=0.0, wrong_rate=0.0)
    assert texts(demonstrate(sudoku, team, faultless, 0), tokenizer)["reviser"] == sudoku.compact_answer


@pytest.mark.parametrize("right", [True, False])
def test_planted_plans_are_what_they_should_be(team: Team, sudoku: Task, right: bool) -> None:
    demonstrator = PlanningDemonstrator(rules=MiniSudoku(), grade=grade, slip_rate=0.0, wrong_rate=0.0)
    answer = demonstrator.answer(sudoku, Random(0), right=right)
    assert grade(sudoku, answer) == right
    assert [char for char in answer if char in "*/?$"] == list("*/?$")
    assert [turn.verdict for turn in plant(sudoku, team, demonstrator, "verifier", right=right, seed=1)] == [None, False, None]
