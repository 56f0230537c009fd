"""Task sets: what is read, what is generated, and the message for each kind of bad input."""

import json
from itertools import chain
from pathlib import Path

import pytest

from mas_hpc.config import (
    AdditionConfig,
    Gsm8kConfig,
    JsonlConfig,
    MathConfig,
    ReasoningGymConfig,
    RingConfig,
)
from mas_hpc.data.tasks import last_boxed, load_tasks
from mas_hpc.errors import ConfigError, DataError


def write(file: Path, *rows: object) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    "config",
    [
        RingConfig(num_digits=5, modulus=4, num_train=400, num_test=112),
        RingConfig(num_digits=6, modulus=3, num_train=200, num_test=43),  # 3**6 / 3 questions: all of them
        AdditionConfig(num_train=40, num_test=15, num_digits=1),
        ReasoningGymConfig(name="chain_sum", num_train=8, num_test=4),
    ],
)
def test_generated_tasks_are_distinct_and_the_same_for_the_same_seed(config):
    train, test = load_tasks(config)
    assert (len(train), len(test)) == (config.num_train, config.num_test)
    assert len({task.question for task in chain(train, test)}) == config.num_train + config.num_test
    assert len({task.id for task in chain(train, test)}) == config.num_train + config.num_test
    assert load_tasks(config) == (train, test)
    assert load_tasks(config.model_copy(update={"seed": 1})) != (train, test)


def test_a_ring_task_asks_for_the_sums_of_its_answer():
    train, _ = load_tasks(RingConfig(num_digits=5, modulus=4, num_train=511, num_test=1))
    task = next(task for task in train if task.compact == "13130")  # 0+1, 1+2, 2+3=5, 3+0, 0+0
    assert task.answer in ("01230", "23012")
    assert "modulo 4, are 1, 3, 1, 3, 0." in task.question
    assert task.question.startswith("Five digits x1 to x5, each from 0 to 3,")
    assert {task.answer[0] for task in train} == set("0123")


def test_addition_writes_the_last_digit_first_and_keeps_commuted_pairs_together():
    train, test = load_tasks(AdditionConfig(num_train=5000, num_test=50))
    for task in train[:50]:
        left, right = (int(part[::-1]) for part in task.compact.split("+"))
        assert int(task.answer[::-1]) == left + right
        assert (len(task.compact), len(task.answer)) == (5, 3)
        assert f"Add {left} and {right}." in task.question
    pairs = [frozenset(task.compact.split("+")) for task in chain(train, test)]
    assert len(set(pairs)) == 5050


def test_too_many_questions_for_a_generator_names_how_many_exist():
    with pytest.raises(ConfigError, match=r"num_train=2000, data.num_test=500: 2500 .* only 512 exist with 5 digits modulo 4"):
        load_tasks(RingConfig(num_digits=5, modulus=4, num_train=2000, num_test=500))
    with pytest.raises(ConfigError, match="only 55 exist"):
        load_tasks(AdditionConfig(num_digits=1))


def test_an_unknown_reasoning_gym_name_is_answered_with_near_ones():
    with pytest.raises(ConfigError, match=r"'chain_summ'.*chain_sum"):
        load_tasks(ReasoningGymConfig(name="chain_summ"))
    with pytest.raises(ConfigError, match="settings of its own"):
        load_tasks(ReasoningGymConfig(name="composite"))
    with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
        load_tasks(ReasoningGymConfig(name="word_ladder"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"first \boxed{3}, then \boxed{4", "3"),
        (r"thus $\boxed 5$ apples", "5"),
        ("none", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


def test_gsm8k_answers_lose_commas_full_stops_and_calculator_marks(tmp_path):
    rows = [
        {"question": "a", "answer": "2*2=<<2*2=4>>4\n#### 2,125"},
        {"question": "b", "answer": "#### 1\nno, #### -3.5."},
        {"question": "c", "answer": "#### $7"},
    ]
    train, test = load_tasks(Gsm8kConfig(path=write(tmp_path / "x.jsonl", *rows), num_train=2, num_test=1))
    tasks = {task.question: task for task in train + test}
    assert {question: task.answer for question, task in tasks.items()} == {"a": "2125", "b": "-3.5", "c": "7"}
    assert tasks["a"].solution == "2*2=4"


def test_math_takes_the_box_before_the_answer_column(tmp_path):
    rows = [
        {"problem": "a", "solution": r"\boxed{1}", "answer": "2"},
        {"problem": "b", "solution": "no box", "answer": "3"},
    ]
    (train,), (test,) = load_tasks(MathConfig(path=write(tmp_path / "x.jsonl", *rows), num_train=1, num_test=1))
    assert {task.question: task.answer for task in (train, test)} == {"a": "1", "b": "3"}


def test_a_folder_keeps_its_splits_and_a_file_is_split(tmp_path):
    write(
        tmp_path / "train.jsonl",
        *({"question": f"train {i}", "answer": i} for i in range(5)),
        {"question": "test 0", "answer": 0},
    )
    write(tmp_path / "test.jsonl", *({"question": f"test {i}", "answer": i} for i in range(4)))
    train, test = load_tasks(JsonlConfig(path=str(tmp_path), num_train=50, num_test=2))
    assert {task.question for task in train} == {f"train {i}" for i in range(5)}  # "test 0" stays out of training
    assert len(test) == 2
    assert all(task.question.startswith("test") for task in test)
    train, test = load_tasks(JsonlConfig(path=str(tmp_path / "test.jsonl"), num_train=50, num_test=1))
    assert (len(train), len(test)) == (3, 1)
    assert not {task.question for task in train} & {task.question for task in test}


def test_fewer_rows_than_asked_are_taken_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", *({"question": str(i), "answer": i} for i in range(5)))
    train, test = load_tasks(JsonlConfig(path=path, num_train=50, num_test=2))
    assert (len(train), len(test)) == (3, 2)
    assert "3 questions for data.num_train=50" in caplog.text
    with pytest.raises(DataError, match=r"5 different questions, of which data.num_test=5 leaves none for training"):
        load_tasks(JsonlConfig(path=path, num_test=5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"question": "a", "answer": 1}\n{"question', r"x.jsonl:2: not JSON \(Unterminated string"),
        ("[1]", "x.jsonl:1: a JSON list; expected one object a line"),
        ('{"problem": "a", "answer": 1}', r"x.jsonl:1: no column 'question'; it has \['answer', 'problem'\]"),
        ('{"question": "a", "answer": null}', "x.jsonl:1: column 'answer' holds None"),
        ('{"question": " ", "answer": 1}', "x.jsonl:1: column 'question' holds ' '"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, content, message):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_tasks(JsonlConfig(path=str(file), num_test=1))


def test_unreadable_answers_name_the_row(tmp_path):
    with pytest.raises(DataError, match=r"x.jsonl:1: the answer ends in 'about 5'; expected '#### <number>'"):
        load_tasks(Gsm8kConfig(path=write(tmp_path / "x.jsonl", {"question": "a", "answer": "about 5"})))
    with pytest.raises(DataError, match=r"x.jsonl:1: no balanced .* and no column 'answer'"):
        load_tasks(MathConfig(path=write(tmp_path / "x.jsonl", {"problem": "a", "solution": r"\boxed{5"})))


def test_a_missing_file_is_answered_with_near_names(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "a", "answer": "#### 1"})
    with pytest.raises(DataError, match=r"trian.jsonl: no such file; .*perhaps \['train.jsonl'\]"):
        load_tasks(Gsm8kConfig(path=str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match=r"test.jsonl: no such file; .*a folder needs train.jsonl and test.jsonl"):
        load_tasks(Gsm8kConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match=r"there is no folder"):
        load_tasks(JsonlConfig(path=str(tmp_path / "none" / "x.jsonl")))


def test_all_of_gsm8k_can_be_read(shared_data):
    train, test = load_tasks(Gsm8kConfig(path=str(shared_data / "gsm8k"), num_train=7473, num_test=1319))
    assert len(test) == 1319
    assert len(train) == 7473
    assert all(float(task.answer) == int(task.answer) for task in train + test)
    assert not any("<<" in task.solution for task in train)
