"""Solutions judged step by step: how they are read, the samples that train a process reward model, and its F1 score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mas_hpc.data.conversations import encode, plain, plain_ids, render_prompt
from mas_hpc.data.files import Row, hold_out, read_rows
from mas_hpc.data.preferences import scored
from mas_hpc.errors import DataError
from mas_hpc.types import Message, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A question and the steps of a solution.

    Example: StepRecord(id="train/1", tree="train/1", prompt="2 + 3 + 4?", steps=("2 + 3 = 5", "5 + 4 = 8"), labels=(1.0, 0.0))
    """

    id: str
    tree: str
    """The same for solutions of one question, which share their first steps."""
    prompt: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    """One a step: probability that it is right, from 0 to 1; nan where that is not known or not to be trained here."""


def load_steps(
    path: str, *, num_train: int, num_test: int, seed: int, neutral: float = 1.0
) -> tuple[tuple[StepRecord, ...], tuple[StepRecord, ...]]:
    """Return (training, test) records in one of three formats, told apart by their columns.

    TRL: `prompt, completions[], labels[]`, labels true, false or from 0 to 1.
    PRM800K: `instruction, responses[], next_response, rating`: each row judges one next step, so its record has a label on
    the last step only. Rating 1 is 1.0, -1 is 0.0, and 0 (neutral) is `neutral`: Lightman et al. 2023 (arXiv:2305.20050)
    count it as right. Rows without a rating are left out, and their number is logged.
    ProcessBench: `problem, steps[], label`, the first wrong step from 0, or -1: later steps have no label.

    Records of one question stay on one side. `path` as in files.read_rows, limits as in files.hold_out. Raises DataError
    naming the row.
    """
    splits = {name: _records(rows, neutral) for name, rows in read_rows(path).items()}
    return hold_out(
        splits, lambda record: record.prompt, path=path, num_train=num_train, num_test=num_test, seed=seed, noun="solutions"
    )


def _records(rows: Sequence[Row], neutral: float) -> list[StepRecord]:
    trees: dict[str, str] = {}
    records = []
    for row in rows:
        prompt_key, read = _format(row, neutral)
        prompt = row.values[prompt_key]
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{row.where}: column {prompt_key!r} holds {prompt!r:.60}; expected text")
        steps, labels = read(row)
        tree = trees.setdefault(prompt, row.id)
        if not all(map(math.isnan, labels)):
            records.append(StepRecord(id=row.id, tree=tree, prompt=prompt, steps=steps, labels=labels))
    if len(records) < len(rows):
        log.warning("%d of %d judged steps have no rating and are left out", len(rows) - len(records), len(rows))
    return records


Reader = Callable[[Row], tuple[tuple[str, ...], tuple[float, ...]]]


def _format(row: Row, neutral: float) -> tuple[str, Reader]:
    """The column of the question, and how steps and labels are read."""
    formats: dict[tuple[str, ...], Reader] = {
        ("prompt", "completions", "labels"): _trl,
        ("instruction", "responses", "next_response", "rating"): lambda row: _prm800k(row, neutral),
        ("problem", "steps", "label"): _processbench,
    }
    for columns, read in formats.items():
        if all(column in row.values for column in columns):
            return columns[0], read
    expected = "; or ".join(", ".join(columns) for columns in formats)
    raise DataError(f"{row.where}: it has columns {sorted(row.values)}; expected {expected}")


def _steps(row: Row, column: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(step, str) and step.strip() for step in value):
        raise DataError(f"{row.where}: column {column!r} holds {value!r:.60}; expected a list of steps, each a text")
    return tuple(value)


def _trl(row: Row) -> tuple[tuple[str, ...], tuple[float, ...]]:
    steps, labels = _steps(row, "completions", row.values["completions"]), row.values["labels"]
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise DataError(f"{row.where}: column 'labels' holds {labels!r:.60}; expected a list of {len(steps)}, one a step")
    for label in labels:
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise DataError(
                f"{row.where}: column 'labels' has {label!r:.20}; expected true, false, or a number from 0 to 1 for each step"
            )
    return steps, tuple(map(float, labels))


def _prm800k(row: Row, neutral: float) -> tuple[tuple[str, ...], tuple[float, ...]]:
    before, rating = row.values["responses"], row.values["rating"]
    steps = _steps(row, "responses and next_response", [*(before or ()), row.values["next_response"]])
    known = {-1: 0.0, 0: neutral, 1: 1.0, None: math.nan}
    if isinstance(rating, bool | str | list) or rating not in known:
        raise DataError(f"{row.where}: column 'rating' holds {rating!r:.20}; expected -1, 0, 1 or null")
    return steps, (*(math.nan,) * (len(steps) - 1), known[rating])


def _processbench(row: Row) -> tuple[tuple[str, ...], tuple[float, ...]]:
    steps, first = _steps(row, "steps", row.values["steps"]), row.values["label"]
    if not isinstance(first, int) or isinstance(first, bool) or not -1 <= first < len(steps):
        raise DataError(
            f"{row.where}: column 'label' holds {first!r:.20}; expected the first wrong step, -1 to {len(steps) - 1}"
        )
    if first == -1:
        return steps, (1.0,) * len(steps)
    return steps, (1.0,) * first + (0.0,) + (math.nan,) * (len(steps) - first - 1)


def step_sample(record: StepRecord, tokenizer: Any, *, policy: str, agent: str, separator: str = "\n\n") -> Sample:
    """The solution with a trained slot for every step that has a label, which is in the column `label` there.

    The score of a step is read at the last token of the separator after it, which stands after the last step too. Question,
    steps and separators are encoded apart, so that solutions share the tokens of the steps that they share. With a chat
    template the question is a user's message, the steps are the assistant's; else they follow it as text.
    """
    if tokenizer.chat_template:
        prompt = render_prompt([Message(role="user", content=record.prompt)], tokenizer, where=f"solution {record.id}")
    else:
        prompt = plain_ids(plain(record.prompt, tokenizer), tokenizer, ends=False) + encode(separator, tokenizer)
    between = encode(separator, tokenizer)
    completion: list[int] = []
    ends = []
    for step in record.steps:
        completion += encode(plain(step, tokenizer), tokenizer) + between
        ends.append(len(completion) - 1)
    known = [(end, label) for end, label in zip(ends, record.labels, strict=True) if not math.isnan(label)]
    sample = Sample(
        id=record.id, tree=record.tree, policy=policy, agent=agent,
        prompt_ids=prompt, prompt_spans=(("", len(prompt)),), completion_ids=tuple(completion),
    )  # fmt: skip
    return scored(sample, at=[end for end, _ in known], labels=[label for _, label in known])


def first_error(scores: Sequence[float], threshold: float = 0.0) -> int:
    """The first step, from 0, whose score is below the threshold (0 for logits, 0.5 for probabilities); -1 if none is."""
    return next((index for index, score in enumerate(scores) if score < threshold), -1)


def first_error_f1(pairs: Iterable[tuple[int, int]]) -> dict[str, float]:
    """ProcessBench's measure of (predicted, true) first errors (Zheng et al. 2024, arXiv:2412.06559, section 3.4).

    accuracy_error: share of the wrong solutions whose first error is found; accuracy_correct: share of the right ones in
    which none is found; f1: their harmonic mean, 0 if both are 0. nan for solutions that there are none of.
    """
    pairs = list(pairs)
    wrong = [predicted == true for predicted, true in pairs if true != -1]
    right = [predicted == true for predicted, true in pairs if true == -1]
    error, correct = (sum(hits) / len(hits) if hits else math.nan for hits in (wrong, right))
    f1 = 2 * error * correct / (error + correct) if error + correct else 0.0
    return {"accuracy_error": error, "accuracy_correct": correct, "f1": f1}
