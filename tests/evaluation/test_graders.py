"""Which answers are right: cases worked out by hand, hostile text, and the real MATH answers."""

import json
import threading

import pytest

from mas_hpc.config import MathConfig, ReasoningGymConfig
from mas_hpc.data.tasks import load_tasks
from mas_hpc.errors import DataError
from mas_hpc.evaluation.graders import grade
from mas_hpc.evaluation.judge import Judge
from mas_hpc.types import Task


def math(reference: str) -> Task:
    return Task(id="t", question="q", answer=reference, grader="math")


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("2125", "2,125", True),
        ("2,125", "$2125.00$", True),
        ("3", "-3", False),
        ("-3", "\N{MINUS SIGN}3", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", " 1/2. ", True),
        ("50", r"50\%", True),
        ("90", r"90^\circ", True),
        ("7", "7 or 8", False),
        ("12", "1,2", False),
        ("1", "1/0", False),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", True),
        ("x+1", "1+x", True),
        ("x+1", "x-1", False),
        ("6", r"6\text{ cm}", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\text{Evelyn}", "evelyn", True),
        ("east", "seat", False),
        ("42", "}{ \\frac ]]", False),
        ("42", "", False),
        ("42", "\ud800", False),
    ],
)
def test_math_answers_are_compared_by_value(reference, answer, right):
    assert grade(math(reference), answer) is right


@pytest.mark.parametrize("text", ["1" * 100_000, "x^" * 50_000, "(" * 100_000, r"\frac{" * 20_000])
@pytest.mark.parametrize("grader", ["math", "exact", "ring", "reasoning_gym"])
def test_endless_text_is_wrong(text, grader):
    task = Task(id="reasoning_gym/chain_sum/0/4/0", question="modulo 4", answer="x", grader=grader, compact="13130")
    assert grade(task, text) is False


def test_a_formula_that_never_ends_is_wrong_and_the_next_one_is_judged():
    judge = Judge(timeout_s=1.0)
    assert judge.ask("math", "42", "9^{9^{9^9}}") is False
    assert judge.ask("math", "y+1", "1+y") is True


def test_formulas_are_judged_in_any_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(grade(math("z+2"), "2+z")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_no_answer_is_wrong_for_every_grader():
    assert not any(grade(Task(id="t", question="q", answer="1", grader=name), None) for name in ("math", "exact", "ring"))


def test_exact_compares_trimmed_text():
    task = Task(id="t", question="q", answer="240", grader="exact")
    assert grade(task, " 240\n")
    assert not grade(task, "0240")


def test_a_ring_accepts_all_its_solutions_and_nothing_else():
    task = Task(id="t", question="... modulo 4 ...", answer="01230", grader="ring", compact="13130")
    right = [text for number in range(4**5) if grade(task, text := base4(number))]
    assert right == ["01230", "23012"]
    assert grade(task, "0, 1, 2, 3, 0")
    wrong = ("45670", "0123", "012300", "abcde", "", "0123\N{ARABIC-INDIC DIGIT ZERO}")  # 4 = 0 modulo 4, but no digit
    assert not any(grade(task, text) for text in wrong)


def base4(number: int) -> str:
    return "".join(str(number // 4**place % 4) for place in range(5))


def test_reasoning_gym_is_scored_by_its_own_scorer():
    (task,), _ = load_tasks(ReasoningGymConfig(name="countdown", num_train=1, num_test=1))
    assert grade(task, task.answer)
    assert grade(task, f"({task.answer})*1") is False  # the library counts the 1 as a number that was not given
    assert grade(task, f"0 + {task.answer}") is False
    assert Judge(timeout_s=1.0).ask("reasoning_gym", task.id, "9**9**9**9", task.question) is False
    (cube,), _ = load_tasks(ReasoningGymConfig(name="rubiks_cube", num_train=1, num_test=1))
    assert cube.answer == ""
    assert grade(cube, "no idea") is False


@pytest.mark.parametrize("name", ["mini_sudoku", "shortest_path"])
def test_the_tiny_models_puzzle_answers_are_scored_in_translation_and_others_as_they_are(name):
    (task,), _ = load_tasks(ReasoningGymConfig(name=name, num_train=1, num_test=1))
    assert grade(task, task.answer) and grade(task, task.compact_answer)
    changed = task.compact_answer[:-1] + ("." if task.compact_answer[-1] != "." else "8")
    unreadable = (changed, task.compact, task.compact_answer[1:], task.compact_answer[::-1], "=" * len(task.compact), "*", "")
    assert not any(grade(task, text) for text in unreadable)


@pytest.mark.parametrize(
    "text",
    [
        "[open({path!r}, 'w').name]",
        "[(open #+\n({path!r}, 'w')).name]",
        "[open\\\n({path!r}, 'w').name]",
        "[[open][0]({path!r}, 'w').name]",
        "[log({path!r}, 'w').name for log in [open]]",
        "[(log := open) and log({path!r}, 'w').name]",
        "[open.__call__({path!r}, 'w').name]",
    ],
)
def test_answers_that_call_functions_are_never_evaluated(text, tmp_path):
    (task,), _ = load_tasks(ReasoningGymConfig(name="string_insertion", num_train=1, num_test=1))
    proof = tmp_path / "proof"
    assert grade(task, text.format(path=str(proof))) is False
    assert not proof.exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(id="t", question="q", answer="1", grader="maths"), "task t: unknown grader 'maths'; expected one of"),
        (Task(id="t", question="q", answer=" ", grader="math"), "the reference answer is empty"),
        (
            Task(id="t", question="q", answer=r"\frac{", grader="math"),
            "cannot read it as a formula; use data.grader=exact",
        ),
        (Task(id="t", question="q", answer="01230", grader="ring", compact="13130"), "expected 'modulo <m>'"),
        (Task(id="t", question="modulo 4", answer="01230", grader="ring"), "digits in compact=''"),
        (Task(id="t", question="q", answer="1", grader="reasoning_gym"), "expected an id reasoning_gym/<name>"),
        (
            Task(id="reasoning_gym/chain_sum/0/4/0", question="another", answer="1", grader="reasoning_gym"),
            "generates another question under this id",
        ),
    ],
)
def test_an_unusable_reference_stops_the_run(task, message):
    with pytest.raises(DataError, match=message):
        grade(task, "5")
    assert grade(math("y+1"), "1+y") is True  # and judging goes on


def test_all_math500_boxes_equal_the_answer_column(shared_data):
    path = shared_data / "math500" / "test.jsonl"
    train, test = load_tasks(MathConfig(path=str(path), num_train=499, num_test=1))
    columns = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = {row["problem"].strip(): row["answer"] for row in columns}
    wrong = [task.id for task in train + test if not grade(task, answers[task.question])]
    assert len(answers) == 500
    assert wrong == []
