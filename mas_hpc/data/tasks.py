"""Task sets: our generators, reasoning-gym by name, GSM8K, MATH and plain rows; training and test are disjoint."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

from mas_hpc.config import (
    AdditionConfig,
    Gsm8kConfig,
    JsonlConfig,
    MathConfig,
    ReasoningGymConfig,
    RingConfig,
    TaskConfig,
)
from mas_hpc.data.compact_puzzles import with_compact
from mas_hpc.data.files import Row, hold_out, read_rows
from mas_hpc.data.puzzles import addition_tasks, ring_tasks
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.types import Task

Tasks = tuple[Task, ...]
FileConfig = Gsm8kConfig | MathConfig | JsonlConfig

_HASH_DEPENDENT = frozenset(
    ("isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder")
)
"""Data sets of reasoning-gym 0.1.25 whose entries follow the order of Python's sets: every process makes others."""


def load_tasks(config: TaskConfig) -> tuple[Tasks, Tasks]:
    """Return (training tasks, test tasks): no question is in both; the same config gives the same tasks.

    Generators give exactly num_train and num_test tasks or raise ConfigError. Files give what they have, with a warning
    when that is less, and raise DataError naming file and line for a row that cannot be used.
    """
    if isinstance(config, RingConfig):
        return _cut(ring_tasks(config), config)
    if isinstance(config, AdditionConfig):
        return _cut(addition_tasks(config), config)
    if isinstance(config, ReasoningGymConfig):
        return _cut(_reasoning_gym_tasks(config), config)
    return _from_rows(config)


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...} whose braces balance (or of `\boxed 5$`); None when there is none.

    Example: last_boxed(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    """
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?<=\s)[^{$]+\$)", text))):
        if opening[1] != "{":  # TeX's unbraced argument, read to the end of the formula as the MATH authors' code does
            return opening[1].rstrip("$").strip()
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[opening.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : opening.end() + brace.start()].strip()
    return None


def _cut(tasks: Sequence[Task], config: RingConfig | AdditionConfig | ReasoningGymConfig) -> tuple[Tasks, Tasks]:
    assert len(tasks) == config.num_test + config.num_train
    return tuple(tasks[config.num_test :]), tuple(tasks[: config.num_test])


# ---- reasoning-gym


def _reasoning_gym_tasks(config: ReasoningGymConfig) -> list[Task]:
    """Distinct questions; the id says how to generate the entry again, which the library's own scorer needs.

    `answer` is "" where the library gives none and only scores.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("data.kind=reasoning_gym: the library is not installed; run: pip install reasoning-gym")
    from reasoning_gym.factory import create_dataset

    _check_reasoning_gym(config)
    wanted = config.num_test + config.num_train
    num_entries = 4 * wanted  # some data sets repeat themselves
    try:
        entries = create_dataset(config.name, seed=config.seed, size=num_entries, **config.settings)
    except (AssertionError, TypeError) as error:
        if config.settings:
            raise ConfigError(f"data.settings={config.settings}: {config.name} refuses them: {error}") from None
        raise ConfigError(f"data.name={config.name!r}: needs settings of its own ({error}); choose another") from None
    chosen = "".join(f"{key}={value}/" for key, value in sorted(config.settings.items()))
    tasks: dict[str, Task] = {}
    for index in range(num_entries):
        entry = entries[index]
        identity = f"reasoning_gym/{config.name}/{chosen}{config.seed}/{num_entries}/{index}"
        task = Task(id=identity, question=entry["question"], answer=entry["answer"] or "", grader="reasoning_gym")
        tasks.setdefault(task.question, with_compact(task))
        if len(tasks) == wanted:
            return list(tasks.values())
    raise ConfigError(
        f"data.num_train={config.num_train}, data.num_test={config.num_test}: {wanted} distinct questions wanted, "
        f"but {num_entries} draws of {config.name!r} gave {len(tasks)}; ask for fewer"
    )


def _check_reasoning_gym(config: ReasoningGymConfig) -> None:
    """Raises ConfigError for a name or setting that the library does not have, or cannot repeat."""
    from reasoning_gym.factory import DATASETS

    if config.name not in DATASETS:
        near = difflib.get_close_matches(config.name, DATASETS, n=5, cutoff=0.4)
        names = f"near names: {near}" if near else f"expected one of {sorted(DATASETS)}"
        raise ConfigError(f"data.name={config.name!r}: reasoning-gym has no such data set; {names}")
    if config.name in _HASH_DEPENDENT and sys.flags.hash_randomization:
        raise ConfigError(
            f"data.name={config.name!r}: its questions change with Python's hash seed, so ranks and graders would "
            "disagree; set the environment variable PYTHONHASHSEED=0, or choose another data set"
        )
    numeric = {field.name: field.type for field in fields(DATASETS[config.name][1]) if field.type in (int, float)}
    valid = sorted(numeric.keys() - {"seed", "size"})
    for key, value in config.settings.items():
        if key not in valid:
            raise ConfigError(f"data.settings.{key}: {config.name} has no such numeric setting; expected one of {valid}")
        if numeric[key] is int and not isinstance(value, int):
            raise ConfigError(f"data.settings.{key}={value}: {config.name} expects a whole number")


# ---- files and hub data sets


def _from_rows(config: FileConfig) -> tuple[Tasks, Tasks]:
    splits = read_rows(config.path, hub=not isinstance(config, JsonlConfig))
    return hold_out(
        {name: _unique(_to_task(row, config) for row in rows) for name, rows in splits.items()},
        lambda task: task.question,
        path=config.path, num_train=config.num_train, num_test=config.num_test, seed=config.seed, noun="questions",
    )  # fmt: skip


def _unique(tasks: Iterable[Task]) -> list[Task]:
    """The first task of every question."""
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.question, task)
    return list(first.values())


# ---- one row -> one task


def _to_task(row: Row, config: FileConfig) -> Task:
    identity = f"{config.kind}/{row.id}"
    if isinstance(config, JsonlConfig):
        question = _text(row, config.question_key, "set data.question_key")
        answer = _text(row, config.answer_key, "set data.answer_key")
        return Task(id=identity, question=question, answer=answer, grader=config.grader)
    question_key, read = _READERS[config.kind]
    answer, solution = read(row)
    return Task(id=identity, question=_text(row, question_key), answer=answer, grader="math", solution=solution)


def _gsm8k_answer(row: Row) -> tuple[str, str]:
    """The number after the last `####`, and the reasoning without calculator marks."""
    text = _text(row, "answer")
    reasoning, marker, tail = text.rpartition("####")
    answer = tail.strip().removesuffix(".").replace(",", "").removeprefix("$")
    if not marker or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", answer):
        remedy = "data.kind=jsonl takes bare answers"
        raise DataError(f"{row.where}: the answer ends in {text[-40:]!r}; expected '#### <number>'; {remedy}")
    return answer, re.sub(r"<<.*?>>", "", reasoning).strip()


def _math_answer(row: Row) -> tuple[str, str]:
    """The last boxed formula of the solution, else the column `answer`; and the solution."""
    solution = _text(row, "solution") if "solution" in row.values else ""
    answer = last_boxed(solution)
    if not answer and "answer" not in row.values:
        columns = sorted(row.values)
        raise DataError(f"{row.where}: no balanced \\boxed{{}} in 'solution' and no column 'answer'; it has {columns}")
    return answer or _text(row, "answer"), solution


_READERS: dict[str, tuple[str, Callable[[Row], tuple[str, str]]]] = {
    "gsm8k": ("question", _gsm8k_answer),
    "math": ("problem", _math_answer),
}


def _text(row: Row, column: str, remedy: str = "choose the data.kind that fits, or data.kind=jsonl") -> str:
    """The column as trimmed text; numbers are written out."""
    value = row.value(column, remedy)
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not text:
        raise DataError(f"{row.where}: column {column!r} holds {value!r:.60}; expected text or a number")
    return text
