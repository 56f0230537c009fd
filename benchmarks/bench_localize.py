"""The first wrong step by executed checks, beside the best constant: BIG-Bench Mistake's three tasks and ProcessBench GSM8K.

Usage: mas-hpc bench localize, or python benchmarks/bench_localize.py --data FOLDER, which holds bigbench_mistake/*.jsonl and
processbench/gsm8k.json. The checks were written while looking at the first 100 rows of each set and at the training sets of
GSM8K and PRM800K; "held-out" are the other rows. Nothing is random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from localize_checks import first_wrong_sorting_step, first_wrong_swap
from reporting import ROOT, Row, report

from mas_hpc.credit_assignment.arithmetic import first_wrong_step
from mas_hpc.data.steps import first_error_f1
from mas_hpc.errors import DataError
from mas_hpc.evaluation.metrics import paired_test, wilson

NUM_SEEN = 100
"""Rows at the head of each set that were looked at."""
NOTES = {
    "accuracy": "share of solutions whose predicted first wrong step is the labelled one, where none is a prediction too",
    "f1": "ProcessBench's: harmonic mean of the accuracies on wrong and on right solutions; of a constant it is 0",
    "peer": "the one index (or none) that is right most often on these very rows, chosen with their labels known",
    "ratio": "accuracy: ours / theirs; f1: 1 + ours - theirs",
    "with question": "the step that rewrites the question in letters is compared with it too; no label calls such a step wrong",
    "limits": "word_sorting and tracking_shuffled_objects need a check of their own each (benchmarks/localize_checks.py); in "
    "ProcessBench most first errors are of understanding and not of arithmetic, which no check by execution sees",
}


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One labelled solution.

    Example: Solution(question="2 + 3 =", steps=("2 + 3 = 6",), label=0, answers_right=False)
    """

    question: str
    steps: tuple[str, ...]
    label: int
    """Index of the first wrong step; -1 if there is none."""
    answers_right: bool
    """Whether its final answer is right."""


Localizer = Callable[[Solution], int]


def main() -> None:
    """Score every localizer; write benchmarks/results/localize.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    folder = parser.parse_args().data
    arithmetic, process = mistakes(folder, "multistep_arithmetic"), process_bench(folder)
    sets: list[tuple[str, list[Solution], Localizer]] = [
        ("multistep_arithmetic", arithmetic, by_arithmetic),
        ("multistep_arithmetic, with question", arithmetic, by_arithmetic_and_question),
        ("word_sorting", mistakes(folder, "word_sorting"), lambda one: first_wrong_sorting_step(one.question, one.steps)),
        (
            "tracking_shuffled_objects",
            mistakes(folder, "tracking_shuffled_objects"),
            lambda one: first_wrong_swap(one.question, one.steps),
        ),
        ("ProcessBench GSM8K", process, by_arithmetic),
    ]
    rows, notes = [], dict(NOTES)
    for name, solutions, localizer in sets:
        for part, chosen in (("all", solutions), ("held-out", solutions[NUM_SEEN:])):
            case = f"{name}, {part} {len(chosen)} rows"
            scored, note = score(case, chosen, localizer)
            rows += scored
            notes[case] = note
    report("localize", rows, notes=notes)
    for case in (row.case for row in rows[::2]):
        print(f"{case}: {notes[case]}")


def mistakes(folder: Path, task: str) -> list[Solution]:
    """A task of BIG-Bench Mistake (Tyen et al. 2023, arXiv 2311.08516)."""
    rows = [json.loads(line) for line in read(folder / "bigbench_mistake" / f"{task}.jsonl").splitlines()]
    return [
        Solution(
            question=row["input"],
            steps=tuple(row["steps"]),
            label=-1 if row["mistake_index"] is None else row["mistake_index"],
            answers_right=row["answer"] == row["target"],
        )
        for row in rows
    ]


def process_bench(folder: Path) -> list[Solution]:
    """The GSM8K part of ProcessBench (Zheng et al. 2024, arXiv 2412.06559)."""
    rows = json.loads(read(folder / "processbench" / "gsm8k.json"))
    return [
        Solution(
            question=row["problem"],
            steps=tuple(row["steps"]),
            label=row["label"],
            answers_right=row["final_answer_correct"],
        )
        for row in rows
    ]


def read(file: Path) -> str:
    """The text of a data file. Raises DataError when it is absent."""
    if not file.is_file():
        raise DataError(f"--data: {file} does not exist; expected a folder with bigbench_mistake/ and processbench/")
    return file.read_text(encoding="utf-8")


def by_arithmetic(solution: Solution) -> int:
    """The first step with a false equality."""
    found = first_wrong_step(solution.steps)
    return -1 if found is None else found[0]


def by_arithmetic_and_question(solution: Solution) -> int:
    """The same, where rewriting the question wrongly is an error too."""
    found = first_wrong_step(solution.steps, solution.question)
    return -1 if found is None else found[0]


def score(case: str, solutions: Sequence[Solution], localizer: Localizer) -> tuple[list[Row], str]:
    """Accuracy and F1 rows of one set, and the intervals in words."""
    labels = [solution.label for solution in solutions]
    constant = max(sorted(set(labels)), key=labels.count)
    predicted = [localizer(solution) for solution in solutions]
    ours = [guess == label for guess, label in zip(predicted, labels, strict=True)]
    theirs = [constant == label for label in labels]
    peer = f"always {'none' if constant == -1 else constant}"
    measures = first_error_f1(zip(predicted, labels, strict=True))
    constant_f1 = first_error_f1((constant, label) for label in labels)["f1"]
    share, base = sum(ours) / len(ours), sum(theirs) / len(theirs)
    rows = [
        Row(case=case, metric="accuracy", ours=share, peer=peer, theirs=base, ratio=share / base, target=1.0),
        Row(
            case=case, metric="f1", ours=measures["f1"], peer=peer, theirs=constant_f1,
            ratio=1 + measures["f1"] - constant_f1, target=1.0,
        ),
    ]  # fmt: skip
    flagged = [one for one, guess in zip(solutions, predicted, strict=True) if one.label == -1 and guess != -1]
    wrong = sum(not one.answers_right for one in flagged)
    test = paired_test(theirs, ours)
    note = (
        f"accuracy {interval(ours)}, {peer} {interval(theirs)}, difference {test.difference:+.3f} "
        f"[{test.low:+.3f}, {test.high:+.3f}], exact McNemar p {test.p_value:.2g}; on wrong solutions "
        f"{measures['accuracy_error']:.3f}, on right ones {measures['accuracy_correct']:.3f}; "
        f"{len(flagged)} flagged that are labelled right, {wrong} of these with a wrong final answer"
    )
    return rows, note


def interval(hits: Sequence[bool]) -> str:
    """Share and its 95% Wilson interval."""
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
