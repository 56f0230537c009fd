"""Rows from each kind of file, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mas_hpc.data.files import hold_out, read_rows
from mas_hpc.errors import DataError

ROWS = [{"question": "a", "steps": ["x", "y"]}, {"question": "b", "steps": []}]


def write(file: Path, rows: list[dict]) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path, name):
    (rows,) = read_rows(str(write(tmp_path / name, ROWS)), hub=False).values()
    assert [row.values for row in rows] == ROWS
    assert rows[0].id == "x/1"
    assert rows[1].where.endswith("x.jsonl:3" if name == "x.jsonl" else f"{name}, row 2")


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    file = tmp_path / "dev.json"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert [row.values for row in read_rows(str(file))["dev"]] == ROWS


def test_a_folder_gives_splits_by_the_words_of_its_file_names(tmp_path):
    write(tmp_path / "phase1_train_plus.parquet", ROWS)
    write(tmp_path / "test-00000-of-00002.jsonl", ROWS[:1])
    write(tmp_path / "test-00001-of-00002.jsonl", ROWS[1:])
    splits = read_rows(str(tmp_path))
    assert {name: [row.id for row in rows] for name, rows in splits.items()} == {
        "train": ["train/1", "train/2"],
        "test": ["test/1", "test/2"],
    }
    write(tmp_path / "latest.json", ROWS)  # "test" is no word of it
    assert len(read_rows(str(tmp_path))["test"]) == 2
    write(tmp_path / "train_other.jsonl", ROWS)
    with pytest.raises(DataError, match=r"\['phase1_train_plus.parquet', 'train_other.jsonl'\] could each be the train split"):
        read_rows(str(tmp_path))
    write(tmp_path / "train.json", ROWS)
    assert len(read_rows(str(tmp_path))["train"]) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", "no table", "x.parquet: not a parquet file"),
        ("x.json", '[{"a": 1},\n 2]', "x.json, row 2: a JSON int; expected an array of objects"),
        ("x.json", '[{"a": 1},\n', "x.json:2: not JSON"),
        ("x.json", "[]", "x.json: the file is empty"),
    ],
)
def test_bad_files_are_named_with_the_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def held_out(splits, num_train=99, num_test=99, seed=0):
    return hold_out(splits, lambda item: item[0], path="p", num_train=num_train, num_test=num_test, seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_equal_keys_stand_together_and_on_one_side(seed):
    items = [f"{key}{number}" for number in range(3) for key in "abcdef"]
    train, test = held_out({"all": items}, num_train=7, num_test=4, seed=seed)
    assert (len(train), len(test)) == (7, 4)
    assert not {item[0] for item in train} & {item[0] for item in test}
    assert [item[0] for item in train[:3]] == [train[0][0]] * 3
    assert held_out({"all": items}, num_train=7, num_test=4, seed=seed) == (train, test)


def test_what_the_test_split_has_is_not_trained_on_even_beyond_the_limit(caplog):
    train, test = held_out({"train": ["a1", "b1", "c1"], "test": ["a2", "b2"]}, num_test=1)
    assert train == ("c1",)
    assert len(test) == 1
    assert "1 rows for data.num_train=99" in caplog.text
    assert held_out({"all": ["a1", "a2"]}, num_train=0)[0] == ()
    with pytest.raises(DataError, match=r"2 different rows, of which data.num_test=1 leaves none"):
        held_out({"all": ["a1", "a2"]}, num_test=1)
