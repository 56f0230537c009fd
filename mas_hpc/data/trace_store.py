"""Traces on disk: one JSON line each, appended, so that a killed run leaves every earlier line readable.

The same line is what ranks exchange. Floats are written with the shortest digits that read back exactly (repr).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mas_hpc.data import lines
from mas_hpc.errors import DataError
from mas_hpc.types import Task, Trace, Turn

_TASK = tuple(field.name for field in fields(Task))
_TURN = tuple(field.name for field in fields(Turn))
_TRACE = tuple(field.name for field in fields(Trace))
_TUPLES = ("prompt_ids", "prompt_spans", "completion_ids", "behavior_logprobs")

_logger = logging.getLogger(__name__)


def to_json(trace: Trace) -> str:
    """One ASCII line without its newline; NaN and infinities are written as Python's json does (NaN, Infinity)."""
    record = {name: getattr(trace, name) for name in _TRACE}
    record["task"] = {name: getattr(trace.task, name) for name in _TASK}
    record["turns"] = [{name: getattr(turn, name) for name in _TURN} for turn in trace.turns]
    return json.dumps(record, separators=(",", ":"))


def from_json(line: str | bytes, where: str = "trace") -> Trace:
    """The trace of one line. Raises DataError starting with `where` when it is not JSON or not a trace."""
    try:
        record = json.loads(line)
        turns = tuple(_turn(turn) for turn in record["turns"])
        return Trace(**record | {"task": Task(**record["task"]), "turns": turns})
    except KeyError as error:
        raise DataError(f"{where}: a trace has no field {error}; {_EXPECTED}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {str(error).replace('.__init__()', '')}; {_EXPECTED}") from None


_EXPECTED = "expected a line written by this version's trace store; remove the line, or the file, and collect again"


def write(path: str | Path, traces: Sequence[Trace], *, sync: bool = True) -> None:
    """Append the traces, each in one write, and force the file to disk unless `sync` is off. One writer a file.

    Raises DataError when the file cannot be written, such as on a full disk: the lines before stay intact.
    """
    lines.append(path, [to_json(trace) for trace in traces], noun="traces", sync=sync)


def read(path: str | Path, wanted: Container[int] | None = None) -> Iterator[Trace]:
    """Traces of a file in order, lazily; with `wanted` only those whose line index (from 0) is in it are parsed.

    An incomplete last line, left by a killed writer, is logged and ignored.
    Raises DataError at once for a missing file, and with file:line on reaching an invalid line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected traces written by a rollout or training run")
    return _read(file, wanted)


def parts(folder: Path, label: str) -> list[Path]:
    """The files of one label: of a run of one rank, then of the ranks of a run of several, in their order."""
    ranks = {int(part.stem.rpartition(".rank")[2]): part for part in folder.glob(f"{label}.rank*.jsonl")}
    alone = folder / f"{label}.jsonl"
    return [*([alone] if alone.is_file() else []), *(ranks[rank] for rank in sorted(ranks))]


def count(path: str | Path) -> int:
    """Number of whole lines, without parsing them."""
    with Path(path).open("rb") as stream:
        return sum(line.endswith(b"\n") for line in stream)


def _read(file: Path, wanted: Container[int] | None) -> Iterator[Trace]:
    with file.open("rb") as stream:
        for index, line in enumerate(stream):
            if wanted is not None and index not in wanted:
                continue
            if line.endswith(b"\n") or lines.is_json(line):
                yield from_json(line, f"{file}:{index + 1}")
            else:
                _logger.warning("%s:%d: incomplete last line ignored (its writer was stopped)", file, index + 1)


def _turn(record: dict[str, Any]) -> Turn:
    for name in _TUPLES:
        record[name] = tuple(record[name])
    record["prompt_spans"] = tuple((policy, length) for policy, length in record["prompt_spans"])
    return Turn(**record)
