"""Rows of data sets: jsonl, json and parquet files, folders of them, and data sets of the hub; and which are held out."""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from mas_hpc.errors import DataError
from mas_hpc.hub import folder_of

Item = TypeVar("Item")
SUFFIXES = (".jsonl", ".json", ".parquet")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a data set.

    Example: Row(split="test", number=1, where="gsm8k/test.jsonl:1", values={"question": "...", "answer": "#### 42"})
    """

    split: str
    number: int
    """Line of a jsonl file, else position; from 1."""
    where: str
    """For messages: file and line, or data set and row."""
    values: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Split and number, unique in the data set."""
        return f"{self.split}/{self.number}"

    @property
    def agent(self) -> str:
        """Who of a team the row speaks for, from a column `agent`; empty where it does not say."""
        name = self.values.get("agent")
        return name if isinstance(name, str) else ""

    def value(self, column: str, remedy: str) -> Any:
        """The column's value. Raises DataError naming the row and the columns that there are."""
        if column not in self.values:
            raise DataError(f"{self.where}: no column {column!r}; it has {sorted(self.values)}; {remedy}")
        return self.values[column]


def read_rows(path: str, *, hub: bool = True) -> dict[str, list[Row]]:
    """Rows by split name: train and test, or the one split that there is.

    `path` is a .jsonl, .json (an array, or an object a line) or .parquet file; a folder with one such file, or its
    numbered parts, named after each of train and test; or, if `hub`, the name of a data set of the hub. Raises DataError
    naming file and line or row.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return {split: _read_split(local, split) for split in ("train", "test")}
    if local.is_file() or _looks_local(path) or not hub:
        return {local.stem: list(_read_file(local, local.stem))}
    return _read_hub(path)


def fetch(path: str) -> None:
    """Bring a data set of the hub, if `path` names one, to this machine's caches. Raises DataError."""
    local = Path(path).expanduser()
    if not (local.exists() or _looks_local(path)):
        _load_hub(path, refresh=True)


def _looks_local(path: str) -> bool:
    return Path(path).suffix in SUFFIXES or path.startswith((".", "/", "~")) or len(Path(path).parts) > 2


def hold_out(
    splits: Mapping[str, Iterable[Item]], key: Callable[[Item], Hashable], *,
    path: str, num_train: int, num_test: int, seed: int, noun: str = "rows",
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:  # fmt: skip
    """Return (training items, test items), at most num_train and num_test of them, shuffled by `seed`.

    Test items are of the split `test` if there is one, else split off. Items of equal `key` stand together and are never on
    both sides: what of them the limit cuts off is left out. Fewer than asked for are taken with a warning; raises DataError
    when none are left to train on.
    """
    rng = random.Random(seed)
    groups = {name: _shuffled_groups(items, key, rng) for name, items in splits.items()}
    if "train" in groups and "test" in groups:
        test = list(chain.from_iterable(groups["test"].values()))
        rest = iter([group for name, group in groups["train"].items() if name not in groups["test"]])
    else:
        (only,) = groups.values()
        rest = iter(only.values())
        test = []
        while len(test) < num_test and (group := next(rest, None)):
            test += group
    train = list(chain.from_iterable(rest))[:num_train]
    test = test[:num_test]
    if num_train and not train:
        found = sum(len(group) for split in groups.values() for group in split.values())
        raise DataError(
            f"data.path={path}: {found} different {noun}, of which data.num_test={num_test} leaves none for training; "
            "lower data.num_test"
        )
    for name, count, asked in (("num_train", len(train), num_train), ("num_test", len(test), num_test)):
        if count < asked:
            log.warning("data.path=%s: %d %s for data.%s=%d; using those", path, count, noun, name, asked)
    return tuple(train), tuple(test)


def _shuffled_groups(items: Iterable[Item], key: Callable[[Item], Hashable], rng: random.Random) -> dict[Hashable, list[Item]]:
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    names = list(groups)
    rng.shuffle(names)
    return {name: groups[name] for name in names}


def _read_split(folder: Path, split: str) -> list[Row]:
    """Rows of train.jsonl, phase1_train_plus.parquet, train-00000-of-00002.parquet, ..."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    named = [file for file in files if file.stem == split]
    named = named or [file for file in files if split in re.split("[^a-z]+", file.stem.lower())]
    parts = {re.sub(r"-\d+-of-", "-*-of-", file.name) for file in named}
    if len(parts) > 1:
        names = [file.name for file in named]
        raise DataError(f"data.path: {folder}: {names} could each be the {split} split; name one file, or keep one")
    rows = list(chain.from_iterable(_read_file(file, split) for file in named or [folder / f"{split}.jsonl"]))
    if len(named) < 2:
        return rows
    return [Row(split=split, number=number, where=row.where, values=row.values) for number, row in enumerate(rows, 1)]


def _read_file(file: Path, split: str) -> Iterator[Row]:
    if not file.is_file():
        raise DataError(
            f"data.path: {file}: no such file; expected rows as .jsonl, .json or .parquet (a folder needs train.jsonl and "
            f"test.jsonl, or the same as .json or .parquet; a single file is split){_near_names(file)}"
        )
    rows = list(_read_parquet(file, split) if file.suffix == ".parquet" else _read_json(file, split))
    if not rows:
        raise DataError(f"{file}: the file is empty; expected rows, in jsonl one JSON object a line")
    yield from rows


def _read_parquet(file: Path, split: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file}: not a parquet file that can be read ({reason}); write it again, or as .jsonl") from None
    return _numbered(table.to_pylist(), split, str(file))


def _numbered(values: Iterable[Mapping[str, Any]], split: str, source: str) -> Iterator[Row]:
    for number, row in enumerate(values, 1):
        yield Row(split=split, number=number, where=f"{source}, row {number}", values=row)


def _read_json(file: Path, split: str) -> Iterator[Row]:
    """A .json file may hold one array; anything else is an object a line."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}"
        raise DataError(f"{file}: not UTF-8 text ({problem}); expected one JSON object a line") from None
    if file.suffix != ".json" or not text.lstrip().startswith("["):
        return _parse_lines(file, split, text.split("\n"))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise DataError(f"{file}, row {number}: a JSON {type(value).__name__}; expected an array of objects")
    return _numbered(values, split, str(file))


def _parse_lines(file: Path, split: str, lines: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise DataError(f"{where}: not JSON ({problem}); expected one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: a JSON {type(values).__name__}; expected one object a line")
        yield Row(split=split, number=number, where=where, values=values)


def _near_names(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    near = difflib.get_close_matches(file.name, [entry.name for entry in folder.iterdir()], n=3, cutoff=0.4)
    return f"; perhaps {near}" if near else ""


def _read_hub(path: str) -> dict[str, list[Row]]:
    splits = _load_hub(path)
    chosen = [split for split in ("train", "test") if split in splits] or list(splits)[:1]
    return {split: list(_numbered(splits[split], split, f"{path} ({split})")) for split in chosen}


def _load_hub(path: str, *, refresh: bool = False) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Splits by name, from the folder that the hub's cache has of it."""
    import datasets

    try:
        folder = str(folder_of(path, "dataset", refresh=refresh))
        names = datasets.get_dataset_config_names(folder)
        return datasets.load_dataset(folder, "main" if "main" in names else None)
    except (OSError, ValueError) as error:  # ConnectionError, DatasetNotFoundError, several configurations, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path={path!r}: no such file or folder here, and as a data set of the hub: {reason}; "
            "expected a folder with train.jsonl and test.jsonl, one jsonl, json or parquet file, or a hub name"
            + _near_names(Path(path))
        ) from None
