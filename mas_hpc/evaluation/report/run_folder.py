"""What a run leaves behind, read into records; every part may be absent, but not all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mas_hpc.data import trace_store
from mas_hpc.errors import DataError
from mas_hpc.types import Trace


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


_Kind = TypeVar("_Kind", bound=_Record)


class Verdicts(_Record):
    """Balance of one judge in one evaluation; see evaluation.metrics.VerdictBalance."""

    recall_right: float | None = None
    recall_wrong: float | None = None
    balanced_accuracy: float | None = None
    unreadable: int = 0


class Row(_Record):
    """One system measured on the held-out questions."""

    name: str
    phase: str = ""
    """before, after, or control."""
    temperature: float | None = None
    accuracy: float
    low: float | None = None
    high: float | None = None
    num_questions: int | None = None
    tokens_per_question: float | None = None
    right: tuple[bool, ...] = ()
    """One flag a question, in the same order in every row of a run."""
    verdicts: dict[str, Verdicts] = {}


class Paired(_Record):
    """The team after training against the team before it, on the same questions; see evaluation.metrics.PairedTest."""

    temperature: float | None = None
    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int


class Estimate(_Record):
    """A mean over messages or paths, with questions as clusters."""

    mean: float | None = None
    standard_error: float | None = None
    half_width: float | None = None
    """Of its 95% interval."""
    n: int = 0


class AgentCredit(_Record):
    """What one agent earned in the paths that were credited."""

    message: Estimate
    """Of its messages."""
    phi: Estimate
    """Of the agent, where the method attributes to agents."""
    first_errors: int = 0


class CreditSummary(_Record):
    """credit/<name>/summary.json, as `mas-hpc credit` writes it."""

    name: str
    method: str
    value: str = ""
    replays: int
    traces: dict[str, int | str]
    agents: dict[str, AgentCredit]
    requests: dict[str, int] = {}


class Results(_Record):
    """results.json."""

    rows: tuple[Row, ...] = ()
    paired: tuple[Paired, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricLine:
    """One training step.

    Example: MetricLine(phase="train", step=3, values={"loss": 0.2, "reward/solver": 0.5})
    """

    phase: str
    step: int
    values: dict[str, float]
    """NaN where the file holds null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """Some of the traces of one file, evenly spread over it."""

    name: str
    total: int
    traces: tuple[Trace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A run folder, read."""

    name: str
    config: str
    """Text of config.yaml; "" when absent."""
    results: Results
    metrics: tuple[MetricLine, ...]
    trace_files: tuple[TraceFile, ...]
    credit: tuple[CreditSummary, ...] = ()


def read_run(folder: Path, traces_per_file: int) -> RunFolder:
    """Read whatever parts exist. Raises DataError when none does, or when one is not what a run writes."""
    config, results, metrics = (folder / name for name in ("config.yaml", "results.json", "metrics.jsonl"))
    stores = sorted(folder.glob("traces/*.jsonl"))
    if not (config.is_file() or results.is_file() or metrics.is_file() or stores):
        raise DataError(
            f"{folder}: not a run folder; expected at least one of config.yaml, results.json, metrics.jsonl, "
            "traces/*.jsonl, as `mas-hpc pipeline` and `mas-hpc rollout` write them"
        )
    return RunFolder(
        name=folder.resolve().name,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        results=_read(Results, results, "an evaluation") if results.is_file() else Results(),
        metrics=_last_of_each_step(_metrics(metrics)) if metrics.is_file() else (),
        trace_files=tuple(_spread(store, traces_per_file) for store in stores),
        credit=tuple(_read(CreditSummary, file, "mas-hpc credit") for file in sorted(folder.glob("credit/*/summary.json"))),
    )


def _read(record: type[_Kind], file: Path, writer: str) -> _Kind:
    try:
        return record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(f"{file}: {where}: {problem['msg']}; expected what {writer} writes: run it again") from None


def _metrics(file: Path) -> Iterator[MetricLine]:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # the writer was stopped in the middle of it
        try:
            record: dict[str, Any] = json.loads(line)
            phase, step = record.pop("phase"), record.pop("step")
            values = {key: math.nan if value is None else float(value) for key, value in record.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{file}:{number}: {error!r}; expected an object with phase, step and numbers: remove the line"
            ) from None
        yield MetricLine(phase=phase, step=step, values=values)


def _last_of_each_step(lines: Iterable[MetricLine]) -> tuple[MetricLine, ...]:
    """A run that was restarted takes steps again."""
    return tuple({(line.phase, line.step): line for line in lines}.values())


def _spread(file: Path, limit: int) -> TraceFile:
    total = trace_store.count(file)
    kept = min(total, limit)
    wanted = {index * total // kept for index in range(kept)}
    return TraceFile(name=file.stem, total=total, traces=tuple(trace_store.read(file, wanted)))
