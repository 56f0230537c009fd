"""Outcomes of replays on disk: what a credit run has sampled is not sampled again, and neither is it after a restart."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from mas_hpc.data import lines
from mas_hpc.errors import DataError
from mas_hpc.types import Turn

Question = frozenset[str] | int
Key = tuple[Question, int]
"""(coalition or number of kept messages, number of the replay)"""
_LINE = TypeAdapter(tuple[str, Question, int, FiniteFloat])


class ValueStore:
    """Outcomes of one run's replays by subject: what they are replays of, from which seed and weights.

    Only outcomes are kept; a failed replay is missing and is tried again by the next run.
    Example: store.of("q0|removal|seed 0|weights 1f3a")[frozenset({"solver"}), 0] = 1.0
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        """Read every rank's file in `folder`; append to this rank's. Raises DataError naming file and line."""
        self._file = folder / f"values.rank{rank}.jsonl"
        self._known: dict[str, dict[Key, float]] = {}
        self._fresh: list[str] = []
        self._sampled: set[tuple[str, Key]] = set()
        self._used: set[tuple[str, Key]] = set()
        for file in sorted(folder.glob("values.rank*.jsonl")):
            self._read(file)

    @property
    def used(self) -> list[str]:
        """A name for each outcome that was read from disk and then asked for: the same name on every rank."""
        texts = (json.dumps([subject, *_to_json(key)]) for subject, key in self._used)
        return sorted(hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts)

    def of(self, subject: str) -> MutableMapping[Key, float]:
        """The outcomes of one subject."""
        return _Outcomes(self, subject, self._known.setdefault(subject, {}))

    def flush(self) -> None:
        """Force to disk what was found since the last call."""
        if self._fresh:
            lines.append(self._file, self._fresh, noun="values")
            self._fresh = []

    def use(self, subject: str, key: Key) -> None:
        """Count one outcome that was asked for, if it is of an earlier run."""
        if (subject, key) not in self._sampled:
            self._used.add((subject, key))

    def note(self, subject: str, key: Key, outcome: float) -> None:
        """Keep one outcome for the next flush."""
        self._sampled.add((subject, key))
        if not math.isnan(outcome):
            self._fresh.append(json.dumps([subject, *_to_json(key), outcome]))

    def _read(self, file: Path) -> None:
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n") and not lines.is_json(line):
                continue  # torn by a kill; append() mends it
            try:
                subject, question, replay, outcome = _LINE.validate_json(line, strict=True)
            except ValidationError:
                raise DataError(
                    f"{file}:{number}: {line[:50]!r}; expected [subject, question, replay, outcome]; remove it, or the file"
                ) from None
            self._known.setdefault(subject, {})[question, replay] = outcome


class _Outcomes(MutableMapping[Key, float]):
    def __init__(self, store: ValueStore, subject: str, known: dict[Key, float]) -> None:
        self._store, self._subject, self._known = store, subject, known

    def __getitem__(self, key: Key) -> float:
        outcome = self._known[key]
        self._store.use(self._subject, key)
        return outcome

    def __setitem__(self, key: Key, outcome: float) -> None:
        self._known[key] = outcome
        self._store.note(self._subject, key, outcome)

    def __delitem__(self, key: Key) -> None:
        del self._known[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _to_json(key: Key) -> tuple[list[str] | int, int]:
    question, replay = key
    return (question if isinstance(question, int) else sorted(question)), replay


def path_digest(path: tuple[Turn, ...]) -> str:
    """Names a recorded path by what its agents read and wrote."""
    record = [(turn.agent, turn.prompt_ids, turn.completion_ids) for turn in path]
    return hashlib.blake2b(json.dumps(record).encode(), digest_size=8).hexdigest()
