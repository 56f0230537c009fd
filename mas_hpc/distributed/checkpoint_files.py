"""Checkpoints as folders: a whole one has a marker, written last, that names its files with their sizes and checksums.

`<run>/checkpoints/<phase>_step_<N>/` holds a safetensors file a rank, `record.json` for what is no tensor, and the marker
`complete.json`. It is written under another name, forced to disk, renamed, and only then marked: a run that is stopped, or a
host that fails, at any moment leaves the checkpoints before it as they were. Nothing here is a pickle, so a checkpoint from
elsewhere runs no code when it is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from mas_hpc.errors import CheckpointError

Phase = Literal["warm_start", "train"]
PHASES: tuple[Phase, ...] = ("warm_start", "train")
"""In the order of a run."""
MARKER, RECORD = "complete.json", "record.json"
UNFINISHED = ".unfinished"
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a run has come: `step` steps of the phase are done.

    Example: Position(phase="train", step=20).name == "train_step_20"
    """

    phase: Phase
    step: int

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.phase}_step_{self.step}"

    @property
    def order(self) -> tuple[int, int]:
        """Positions of a run, sorted by this, are in the order of time."""
        return PHASES.index(self.phase), self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSum:
    """What a file has to look like.

    Example: FileSum(num_bytes=1024, xxh3_128="99aa06d3014798d86001c324468d497f")
    """

    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What says that a checkpoint is whole.

    Example: Marker(position=Position(phase="train", step=20), is_end=False, score=0.5, world_size=2, files={})
    """

    position: Position
    is_end: bool
    """Whether the phase ended there."""
    score: float | None
    """Held-out metric of these weights, larger is better; None where nobody looked."""
    world_size: int
    """Ranks that wrote it."""
    files: Mapping[str, FileSum]

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Marker:
        """What `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        found: dict[str, Any] = json.loads(text)
        position = Position(**found.pop("position"))
        files = {name: FileSum(**file) for name, file in found.pop("files").items()}
        return Marker(position=position, files=files, **found)


# ---- reading


def folders(root: Path) -> list[tuple[Position, Path]]:
    """Everything that is named like a checkpoint, whole or not, the oldest first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        phase, _, step = folder.name.rpartition("_step_")
        if phase in PHASES and step.isdecimal():
            found.append((Position(phase=phase, step=int(step)), folder))
    return sorted(found, key=lambda one: one[0].order)


def read_marker(folder: Path) -> Marker | None:
    """The marker; None where there is none, or it is damaged: the checkpoint is not whole then."""
    try:
        return Marker.from_json((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def marked(root: Path) -> list[Marker]:
    """Markers of the checkpoints that have one, the oldest first; their files may be damaged all the same."""
    markers = [read_marker(folder) for _, folder in folders(root)]
    return [marker for marker in markers if marker]


def problems(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """What is wrong with these files, one text each; empty when they are as they were written. Reads all of them."""
    found = []
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif (size := file.stat().st_size) != expected.num_bytes:
            found.append(f"{name} has {size} bytes of {expected.num_bytes}")
        elif sum_of(file) != expected:
            found.append(f"{name} has another checksum than when it was written")
    return found


def sum_of(file: Path) -> FileSum:
    """Size and checksum of a file; other threads run meanwhile."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileSum(num_bytes=size, xxh3_128=digest.hexdigest())


# ---- writing


def force_to_disk(path: Path) -> None:
    """A file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> FileSum:
    """Write a small file, force it to disk and return what it has to look like."""
    file.write_text(text, encoding="utf-8")
    force_to_disk(file)
    return sum_of(file)


def publish(unfinished: Path, marker: Marker) -> Path:
    """Give a checkpoint whose files are on disk its name and its marker; one of the same name is replaced."""
    target = unfinished.with_name(marker.position.name)
    force_to_disk(unfinished)
    remove(target)
    unfinished.rename(target)
    force_to_disk(target.parent)
    draft = target / f"{MARKER}{UNFINISHED}"
    write_text(draft, marker.to_json())
    draft.rename(target / MARKER)
    force_to_disk(target)
    return target


def remove(folder: Path) -> None:
    """Delete a checkpoint, if it is there; its marker first, so that half of it is never taken for a whole one."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def remove_all_but(root: Path, kept: Iterable[Position]) -> None:
    """Delete the other checkpoints, whole or not, and what an attempt left unfinished."""
    names = {position.name for position in kept}
    for folder in [*(folder for _, folder in folders(root)), *root.glob(f"*{UNFINISHED}")]:
        if folder.name not in names:
            remove(folder)


def worth_keeping(markers: Sequence[Marker], *, keep_last: int, keep_best: bool) -> list[Position]:
    """Of whole checkpoints in the order of time: the newest `keep_last`, the one of the best score, and the ends of phases.

    Those of an earlier phase than the newest are of no use but for its end, which later phases begin from.
    """
    phase = markers[-1].position.phase
    own = [marker for marker in markers if marker.position.phase == phase]
    scored = [marker for marker in own if marker.score is not None] if keep_best else []
    best = [max(scored, key=lambda marker: marker.score or 0.0)] if scored else []  # of equal ones the first
    kept = [*own[-keep_last:], *best, *(marker for marker in markers if marker.is_end)]
    return [marker.position for marker in kept]


def unreadable(folder: Path, reason: str, remedy: str) -> CheckpointError:
    """The error of a checkpoint that cannot be used."""
    return CheckpointError(f"{folder}: {reason}; {remedy}")
