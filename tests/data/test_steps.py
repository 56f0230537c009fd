"""Judged steps of each format, where their labels stand, and the first-error F1."""

from __future__ import annotations

import json
import math

import pytest

from mas_hpc.data.steps import StepRecord, first_error, first_error_f1, load_steps, step_sample
from mas_hpc.data.token_tree import pack
from mas_hpc.errors import DataError

NAN = math.nan
WHO = {"policy": "shared", "agent": "solver"}


def load(file, *rows, num_train=99, num_test=0, **options):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_steps(str(file), num_train=num_train, num_test=num_test, seed=0, **options)


def prm800k(rating, *steps, instruction="q"):
    return {"instruction": instruction, "responses": list(steps[:-1]), "next_response": steps[-1], "rating": rating}


def test_trl_rows_may_have_soft_labels(tmp_path):
    (record,), _ = load(tmp_path / "x.jsonl", {"prompt": "q", "completions": ["a", "b", "c"], "labels": [True, 0, 0.25]})
    assert record == StepRecord(id="x/1", tree="x/1", prompt="q", steps=("a", "b", "c"), labels=(1.0, 0.0, 0.25))


@pytest.mark.parametrize("label", [-100, 2, 1.5, "true", None, NAN])
def test_g39_labels_outside_zero_to_one_are_refused(tmp_path, label):
    with pytest.raises(DataError, match=r"x.jsonl:1: column 'labels' has .*; expected true, false, or a number from 0 to 1"):
        load(tmp_path / "x.jsonl", {"prompt": "q", "completions": ["a", "b"], "labels": [True, label]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "completions": ["a"]},
            r"columns \['completions', 'prompt'\]; expected prompt, completions, labels; or",
        ),
        ({"prompt": "q", "completions": ["a"], "labels": [1, 0]}, r"'labels' holds \[1, 0\]; expected a list of 1"),
        ({"prompt": "q", "completions": ["a", " "], "labels": [1, 0]}, "expected a list of steps, each a text"),
        ({"prompt": "q", "completions": [], "labels": []}, "expected a list of steps, each a text"),
        ({"prompt": " ", "completions": ["a"], "labels": [1]}, "column 'prompt' holds ' '"),
        ({"problem": "q", "steps": ["a"], "label": 1}, "'label' holds 1; expected the first wrong step, -1 to 0"),
        (prm800k(2, "a"), "column 'rating' holds 2; expected -1, 0, 1 or null"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(DataError, match=r"x.jsonl:1: .*" + message):
        load(tmp_path / "x.jsonl", row)


def test_prm800k_rows_judge_their_last_step_and_share_the_tree_of_their_question(tmp_path, caplog):
    rows = [
        prm800k(1, "a"),
        prm800k(0, "a", "b"),
        prm800k(None, "a", "x"),
        prm800k(-1.0, "a", "c"),
        prm800k(1, "a", instruction="r"),
    ]
    train, _ = load(tmp_path / "x.jsonl", *rows, neutral=0.5)
    by_id = {record.id: record for record in train}
    assert {name: record.labels[-1] for name, record in by_id.items()} == {"x/1": 1.0, "x/2": 0.5, "x/4": 0.0, "x/5": 1.0}
    assert math.isnan(by_id["x/2"].labels[0])
    assert [by_id[name].tree for name in ("x/1", "x/2", "x/4", "x/5")] == ["x/1", "x/1", "x/1", "x/5"]
    assert "1 of 5 judged steps have no rating" in caplog.text


def test_processbench_labels_end_at_the_first_error(tmp_path):
    rows = [{"problem": "q", "steps": ["a", "b", "c"], "label": label} for label in (1, -1)]
    _, test = load(tmp_path / "x.jsonl", *rows, num_train=0, num_test=2)
    wrong, right = sorted(test, key=lambda record: record.id)
    assert wrong.labels[:2] == (1.0, 0.0)
    assert math.isnan(wrong.labels[2])
    assert right.labels == (1.0, 1.0, 1.0)
    assert (first_error(wrong.labels, 0.5), first_error(right.labels, 0.5)) == (1, -1)


@pytest.mark.parametrize("separator", ["\n\n", "\n", ""])
def test_g39_labels_stand_only_at_the_end_of_each_steps_separator(make_tokenizer, separator):
    tokenizer = make_tokenizer()
    record = StepRecord(id="r", tree="t", prompt="q", steps=("ab", "cd", "e<|im_end|>f"), labels=(1.0, NAN, 0.25))
    sample = step_sample(record, tokenizer, separator=separator, **WHO)
    tree = pack([sample], adapters={}, scope="sequence")
    assert tokenizer.decode(sample.prompt_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tree.column_N["label"].tolist() == [1.0, 0.25]
    read_after = [tokenizer.decode(tree.token_T[: index + 1].tolist()) for index in tree.predictor_N.tolist()]
    prompt = tokenizer.decode(sample.prompt_ids)
    assert read_after == [
        f"{prompt}ab{separator}",
        f"{prompt}ab{separator}cd{separator}e< |im_end|>f{separator}",
    ]


def test_solutions_of_one_question_share_the_tokens_of_their_common_steps(make_tokenizer):
    tokenizer = make_tokenizer(None)
    records = [
        StepRecord(id=str(n), tree="t", prompt="q", steps=("a", step), labels=(NAN, label))
        for n, (step, label) in enumerate((("b", 1.0), ("c", 0.0)))
    ]
    tree = pack([step_sample(r, tokenizer, separator="\n", **WHO) for r in records], adapters={}, scope="sequence")
    assert tokenizer.decode(tree.token_T.tolist()) == "q\na\nb\nc\n"
    assert tree.column_N["label"].tolist() == [1.0, 0.0]


def test_the_first_error_is_the_first_score_below_the_threshold():
    assert first_error([1.0, 0.0, -0.1, -5.0]) == 2
    assert first_error([0.9, 0.4], threshold=0.5) == 1
    assert first_error([]) == first_error([0.0]) == -1


def test_first_error_f1_is_the_harmonic_mean_of_both_accuracies():
    pairs = [(1, 1), (2, 1), (-1, 0), (3, 3), (-1, -1), (-1, -1), (-1, -1), (0, -1)]  # 2 of 4, 3 of 4
    assert first_error_f1(pairs) == pytest.approx({"accuracy_error": 0.5, "accuracy_correct": 0.75, "f1": 0.6})
    assert first_error_f1([(-1, 0), (-1, -1)])["f1"] == 0.0  # the best constant
    assert first_error_f1([(0, -1), (-1, 0)])["f1"] == 0.0
    assert math.isnan(first_error_f1([(0, 0)])["f1"])


def test_all_of_prm800k_phase_1_is_read_and_splits_by_question(shared_data):
    train, test = load_steps(str(shared_data / "prm800k_phase1"), num_train=10**6, num_test=10**6, seed=0)
    assert (len(train), len(test)) == (51835 - 3163, 5449 - 367)
    assert not {record.prompt for record in train} & {record.prompt for record in test}
    labels = [record.labels[-1] for record in train]
    assert (labels.count(1.0), labels.count(0.0)) == (18782 + 10234, 19656)


def test_processbench_is_read_whole_for_evaluation(shared_data):
    _, test = load_steps(str(shared_data / "processbench" / "gsm8k.json"), num_train=0, num_test=400, seed=0)
    assert len(test) == 400
    true = [first_error(record.labels, 0.5) for record in test]
    assert first_error_f1(zip(true, true, strict=True))["f1"] == 1.0
    assert true.count(-1) == 193
