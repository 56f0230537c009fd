"""The checkpoints of a run: taken while training goes on, found again, and loaded on any number of ranks by any strategy."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from mas_hpc.config_distributed import CheckpointConfig
from mas_hpc.distributed import checkpoint_files as files
from mas_hpc.distributed.checkpoint_files import UNFINISHED, FileSum, Marker, Position
from mas_hpc.distributed.checkpoint_format import layout, read_into, write
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import COLLECTIVE_TIMEOUT, World
from mas_hpc.errors import CheckpointError

LEAVE_S = 10.0
"""How long a run that fails waits for a checkpoint that is being written: its ranks may wait for one that is gone."""
_OWN = "@rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What something has to remember so that it can go on.

    Example: State(tensors={"parameter/head.weight": weight}, record={"num_steps": 20})
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The same on every rank, or parts of the same whole (DTensors)."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """Of this rank alone."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for JSON, the same on every rank."""


class Part(Protocol):
    """Something whose state a checkpoint holds."""

    def state(self) -> State:
        """The state as it is, tensors not copied. Collective."""
        ...

    def restore(self, saved: Saved) -> None:
        """Take the state of a checkpoint over. Collective."""
        ...


class Saved:
    """One part of a checkpoint on disk, whose files are whole.

    Example: Saved(folder, world, group).under("policy").record["num_steps"]
    """

    def __init__(self, folder: Path, world: World, group: dist.ProcessGroup | None, part: str = "") -> None:
        self.folder, self._world, self._group, self._part = folder, world, group, part
        marker = files.read_marker(folder)
        assert marker, f"{folder} has no marker"
        self.marker = marker
        self._prefix = f"{part}/" if part else ""
        found = layout(folder)
        self._layout = {name.removeprefix(self._prefix): kind for name, kind in found.items() if name.startswith(self._prefix)}

    def under(self, part: str) -> Saved:
        """The part of that name."""
        return Saved(self.folder, self._world, self._group, part)

    @property
    def record(self) -> dict[str, Any]:
        """The part's plain data."""
        found: dict[str, dict[str, Any]] = json.loads((self.folder / files.RECORD).read_text(encoding="utf-8"))
        return found[self._part]

    @property
    def same_ranks(self) -> bool:
        """Whether it was written by as many ranks as there are."""
        return self.marker.world_size == self._world.size

    @property
    def names(self) -> list[str]:
        """Of the part's tensors that all ranks share."""
        return [name for name in self._layout if _OWN not in name]

    def fill(self, tensors: Mapping[str, Tensor], *, only: str = "") -> None:
        """Overwrite these tensors, which are all that the part has for all ranks under names that begin so. Collective.

        Raises CheckpointError, before any is touched, when names, shapes or types are not those of the checkpoint.
        """
        wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        saved = {name: self._layout[name] for name in self.names if name.startswith(only)}
        differing = [name for name in sorted(wanted.keys() | saved.keys()) if wanted.get(name) != saved.get(name)]
        if differing:
            name = differing[0]
            there, here = _said(saved.get(name)), _said(wanted.get(name))
            raise files.unreadable(
                self.folder, f"{self._prefix}{name} is {there} there and {here} in this run",
                f"it is of another model or method ({len(differing)} tensors differ): go on with the configuration and model "
                "that the run was started with",
            )  # fmt: skip
        self._read(tensors)

    def fill_own(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite what this rank had saved for itself; only by as many ranks as wrote it. Collective."""
        assert self.same_ranks
        self._read({_own(name, self._world.rank): tensor for name, tensor in tensors.items()})

    def _read(self, tensors: Mapping[str, Tensor]) -> None:
        read_into(self.folder, {f"{self._prefix}{name}": tensor for name, tensor in tensors.items()}, self._group)


class Checkpoints:
    """Checkpoints under a folder; with `asynchronous` they are copied at once and written by a thread, one at a time."""

    def __init__(self, world: World, root: Path, settings: CheckpointConfig) -> None:
        """Collective: the thread has a process group of its own, since on one that trains too its messages would mix."""
        self.world, self.root, self._settings = world, root, settings
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world.size > 1 else None
        self._stager = DefaultStager(StagingOptions(False, False, False, False))  # keeps its buffers from save to save
        self._writing: _Writing | None = None

    # ---- finding

    def find(self, step: int | None, say: Callable[[str], None]) -> Position | None:
        """The newest whole checkpoint, or that of a step of training; None where there is none at all. Collective.

        `say` is told of newer ones that are not whole. Raises CheckpointError when that of `step`, or every one, is damaged.
        """
        there = self._listed()
        if step is not None:
            position = Position(phase="train", step=step)
            if wrong := self.problems(position):
                whole = [str(other.step) for other in there if other.phase == "train" and other != position]
                raise files.unreadable(
                    self.root / position.name, wrong[0], f"training has checkpoints of steps {', '.join(whole) or '- (none)'}"
                )
            return position
        for position in reversed(there):
            wrong = self.problems(position)
            if not wrong:
                return position
            say(f"{self.root / position.name}: {'; '.join(wrong)}: it is left out, the one before it counts")
        if there:
            raise files.unreadable(self.root, "no checkpoint there is whole", "start a new run")
        return None

    def problems(self, position: Position) -> list[str]:
        """What is wrong with a checkpoint; each rank reads its share of the files. Collective."""
        folder = self.root / position.name
        marker = files.read_marker(folder)
        if not folder.is_dir():
            found = ["there is no such checkpoint"]
        elif marker is None:
            found = ["it has no completion marker, so it was being written when the run ended"]
        else:
            mine = sorted(marker.files)[self.world.rank :: self.world.size]
            found = files.problems(folder, {name: marker.files[name] for name in mine})
        return list(dict.fromkeys(gather_lines(self.world, found)))

    def _listed(self) -> list[Position]:
        """All checkpoints, whole or not, the oldest first, as the first rank sees them."""
        names = [folder.name for _, folder in files.folders(self.root)] if self.world.is_first else []
        wanted = set(gather_lines(self.world, names))
        parts = [name.rpartition("_step_") for name in wanted]
        found = [Position(phase=phase, step=int(step)) for phase, _, step in parts]  # type: ignore[arg-type]
        return sorted(found, key=lambda position: position.order)

    def open(self, position: Position) -> Saved:
        """A checkpoint that has no problems."""
        return Saved(self.root / position.name, self.world, self._group)

    def newest(self, phase: str) -> Position | None:
        """The last whole checkpoint of the phase, once what is being written is on disk. Collective."""
        self.wait()
        there = [position for position in reversed(self._listed()) if position.phase == phase]
        return next((position for position in there if not self.problems(position)), None)

    def forget_after(self, position: Position | None) -> None:
        """Delete what an earlier attempt has written of later steps, and what it left half-written. Collective."""
        if self.world.is_first:
            kept = [marker.position for marker in files.marked(self.root)]
            files.remove_all_but(self.root, [one for one in kept if position and one.order <= position.order])
        gather_lines(self.world, ["done"])

    # ---- saving

    def save(self, position: Position, parts: Mapping[str, State], *, is_end: bool = False, score: float | None = None) -> None:
        """Take a checkpoint of these states, then delete those that are not worth keeping. Collective.

        Raises CheckpointError when this one, or with `asynchronous` the one before it, cannot be written.
        """
        self.wait()
        tensors = _placed(self.world, {name: state.tensors for name, state in parts.items()})
        for name, state in parts.items():
            tensors |= {f"{name}/{_own(own, self.world.rank)}": tensor for own, tensor in state.own.items()}
        record = json.dumps({name: dict(state.record) for name, state in parts.items()})
        unfinished = self.root / f"{position.name}{UNFINISHED}"

        def finish(written: dict[str, FileSum]) -> None:
            sums = {**written, files.RECORD: files.write_text(unfinished / files.RECORD, record)}
            marker = Marker(position=position, is_end=is_end, score=score, world_size=self.world.size, files=sums)
            files.publish(unfinished, marker)
            self.world.watch.kept()
            self._prune()

        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)

        def write_all() -> None:
            try:
                write(unfinished, staged, self._group, finish)
            except CheckpointError:
                if self.world.is_first:
                    files.remove(unfinished)  # a full disk needs the room
                raise

        self._writing = _Writing(write_all)
        if not self._settings.asynchronous:
            self.wait()

    def _prune(self) -> None:
        settings = self._settings
        markers = files.marked(self.root)
        files.remove_all_but(
            self.root, files.worth_keeping(markers, keep_last=settings.keep_last, keep_best=settings.keep_best)
        )  # fmt: skip

    def wait(self) -> None:
        """Until what is being written is on disk. Raises CheckpointError when it could not be written."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.join()

    def close(self, *, failed: bool = False) -> None:
        """Wait for the last one; where the run `failed`, not long, and without a word. Collective."""
        if failed and self._writing:
            self._writing.thread.join(None if self.world.size == 1 else LEAVE_S)
        elif not failed:
            self.wait()
        self._stager.close()


class _Writing:
    """A thread that writes; what it raises is raised again where it is waited for."""

    def __init__(self, write_all: Callable[[], None]) -> None:
        self._write_all = write_all
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._write_all()
        except Exception as error:  # noqa: BLE001 (it goes on in the thread that waits)
            self._error = error

    def join(self) -> None:
        self.thread.join()
        if isinstance(self._error, CheckpointError):
            remedy = "make room, or mend the file system, and resume"
            raise CheckpointError(f"{self._error}; the checkpoints before it are as they were: {remedy}") from None
        if self._error:
            raise self._error


def _said(kind: tuple[tuple[int, ...], Any] | None) -> str:
    return f"{list(kind[0])} {str(kind[1]).removeprefix('torch.')}" if kind else "absent"


def _own(name: str, rank: int) -> str:
    return f"{name}{_OWN}{rank}"


def _placed(world: World, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What this rank writes: its parts of sharded tensors, and its share of those that every rank holds whole."""
    named = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    whole = {name: tensor.nbytes for name, tensor in named.items() if not isinstance(tensor, DTensor)}
    mine = set(_share(whole, world.rank, world.size))
    return {name: tensor for name, tensor in named.items() if name not in whole or name in mine}


def _share(sizes: Mapping[str, int], rank: int, size: int) -> Sequence[str]:
    """Names, the largest first, each for the rank with the fewest bytes so far; the same answer on every rank."""
    load, mine = [0] * size, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        target = load.index(min(load))
        load[target] += sizes[name]
        if target == rank:
            mine.append(name)
    return mine
