"""What mas-hpc calibrate has measured on a machine, as a file; and the straight lines that it draws through its collectives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mas_hpc.errors import ConfigError


class Line(BaseModel):
    """Alpha and beta of one collective.

    Example: Line(collective="all_reduce", latency_s=1e-4, s_per_byte=1e-9, residual=0.05)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    collective: str
    latency_s: float
    s_per_byte: float
    residual: float
    """Root mean square of relative errors at the sizes that were measured."""


class Calibration(BaseModel):
    """Rates of one rank with all others at work, and collectives of all ranks.

    Example: read_calibration(Path("calibration.json")).ranks == 2
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    date: str
    versions: dict[str, str]
    device: str
    ranks: int
    gemm_tflops: float
    """Of products of matrices."""
    pass_tflops: float
    """That a forward and backward pass of a small model reaches."""
    memory_gb_per_s: float
    """Of a triad."""
    optimizer_gb_per_s: float
    """That an AdamW step reaches, counted as OPTIMIZER_PASSES does."""
    collectives: tuple[Line, ...]
    spread: float
    """Standard deviation of the logarithm of repeated passes."""


def read_calibration(file: Path) -> Calibration:
    """Raises ConfigError for a file that calibrate has not written."""
    try:
        return Calibration.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--calibration {file}: {error.strerror}; write one with: mas-hpc calibrate -o {file}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
        raise ConfigError(f"--calibration {file}: {wrong}; write it again with: mas-hpc calibrate -o {file}") from None


def fit_line(collective: str, num_bytes: Sequence[float], seconds: Sequence[float]) -> Line:
    """Least squares of relative errors, with neither constant below 0: small calls count as much as large ones."""
    sizes, measured = np.asarray(num_bytes, float), np.asarray(seconds, float)
    columns = np.stack([1 / measured, sizes / measured], axis=1)
    candidates = [np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]]
    for place in (0, 1):  # where one would be negative it is 0, and the other is fitted alone
        alone = np.zeros(2)
        alone[place] = columns[:, place].sum() / (columns[:, place] ** 2).sum()
        candidates.append(alone)
    allowed = [found for found in candidates if (found >= 0).all()]
    best = min(allowed, key=lambda found: float(((columns @ found - 1) ** 2).sum()))
    residual = float(np.sqrt(((columns @ best - 1) ** 2).mean()))
    return Line(collective=collective, latency_s=float(best[0]), s_per_byte=float(best[1]), residual=residual)
