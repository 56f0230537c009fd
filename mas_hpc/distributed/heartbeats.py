"""What ranks say about themselves: where they are, and what ended them. In the store of an attempt, and in the run folder."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store

from mas_hpc.distributed.many_keys import read_there
from mas_hpc.exits import exit_code

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A sign of life.

    Example: Heartbeat(rank=1, phase="train", step=7, count=310, beat=42, num_kept=7, stall_s=300.0, pid=4711, host="x1921c0s0",
    time_s=1.78e9)
    """

    rank: int
    phase: str
    """Such as loading, warm_start, train, before, report."""
    step: int
    count: int
    """Grows while the rank gets anywhere; see Watch."""
    beat: int
    """Grows with every sign of life."""
    num_kept: int
    """How often this rank has written what a restart goes on from."""
    stall_s: float
    """How long the beat may stay the same; 0 from a rank that has ended well."""
    pid: int
    host: str
    time_s: float
    """Unix time of the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastError:
    """What ended a rank.

    Example: LastError(rank=1, code=70, kind="ValueError", message="...", place="learner.py:93", phase="train", step=7)
    """

    rank: int
    code: int
    """As in mas_hpc.exits."""
    kind: str
    """Name of the error's type."""
    message: str
    """Its first line."""
    place: str
    """File and line of this project where it was raised, or was passed through on its way out of a library."""
    phase: str
    step: int

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for the same error at the same step, whoever had it; messages may hold addresses and times."""
        return self.kind, self.place, self.phase, self.step


Said = TypeVar("Said", Heartbeat, LastError)


def say(store: Store, said: Heartbeat | LastError) -> None:
    """Let others read it, in place of what this rank said before."""
    PrefixStore("watch", store).set(f"{type(said).__name__}/{said.rank}", json.dumps(asdict(said)))


def read(store: Store, kind: type[Said], rank: int) -> Said | None:
    """What a rank has last said of this kind; None before it has."""
    watch, key = PrefixStore("watch", store), f"{kind.__name__}/{rank}"
    return kind(**json.loads(watch.get(key))) if watch.check([key]) else None


def read_all(store: Store, kind: type[Said], ranks: Sequence[int]) -> dict[int, Said]:
    """What these ranks have last said of this kind; of those that have."""
    found = read_there(PrefixStore("watch", store), [f"{kind.__name__}/{rank}" for rank in ranks])
    return {int(key.rpartition("/")[2]): kind(**json.loads(said)) for key, said in found.items()}


def write(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace this rank's heartbeats/rank_<r>.json in the run folder by this one, at once."""
    file = folder / "heartbeats" / f"rank_{heartbeat.rank}.json"
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(asdict(heartbeat)), encoding="ascii")
    os.replace(part, file)


def last_error(error: BaseException, *, rank: int, phase: str, step: int) -> LastError:
    """The record of an error that ends this rank."""
    lines = str(error).splitlines()
    return LastError(
        rank=rank, code=exit_code(error), kind=type(error).__name__, message=lines[0] if lines else "", place=_place(error),
        phase=phase, step=step,
    )  # fmt: skip


def _place(error: BaseException) -> str:
    frames: list[Any] = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
