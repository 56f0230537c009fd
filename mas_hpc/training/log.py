"""Where metrics go: a JSON line a step, and TensorBoard or wandb when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mas_hpc.errors import ConfigError


class MetricsLog:
    """Appends to metrics.jsonl in the run folder; on ranks other than the first it writes nothing."""

    def __init__(self, folder: Path, *, is_writer: bool, tracking: Literal["none", "tensorboard", "wandb"]) -> None:
        self._stream = (folder / "metrics.jsonl").open("a", encoding="utf-8") if is_writer else None
        self._sink = _open_sink(tracking, folder) if is_writer else None

    def __call__(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics; the line is on disk when the call returns."""
        if self._stream is None:
            return
        self._stream.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")
        self._stream.flush()
        if self._sink:
            self._sink(phase, step, metrics)


def _open_sink(tracking: Literal["none", "tensorboard", "wandb"], folder: Path) -> Any:
    if tracking == "none":
        return None
    try:
        return _tensorboard(folder) if tracking == "tensorboard" else _wandb(folder)
    except ImportError as error:
        raise ConfigError(f"tracking={tracking}: {error}; install it with: pip install 'mas-hpc[tracking]'") from None


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(phase: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{phase}/{name}", value, step)

    return sink


def _wandb(folder: Path) -> Any:
    import wandb

    run = wandb.init(dir=str(folder), name=folder.name, mode="offline")

    def sink(phase: str, step: int, metrics: Mapping[str, float]) -> None:
        run.log({f"{phase}/{name}": value for name, value in metrics.items()} | {f"{phase}/step": step})

    return sink
