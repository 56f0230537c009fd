"""One rank of the drill: mas-hpc with faults planted from outside. Arguments as those of mas-hpc; DRILL_PLAN names the plan.

The plan is {"folder": where events go, "run": the run folder, "faults": [{"number", "kind", "rank", "step", "delay"}]}. Each
fault happens once, however often the ranks start again: `delay` of a step's time after its rank has done `step` training steps,
or more where the ranks have not yet started again after the fault before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAN = json.loads(Path(os.environ["DRILL_PLAN"]).read_text())
FOLDER, RUN = Path(PLAN["folder"]), Path(PLAN["run"])
RANK = int(os.environ.get("RANK", os.environ.get("PMI_RANK", "0")))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("MAS_HPC_ATTEMPT", "0")))
LONGEST_STEP_S = 0.3
"""The first one is counted from the start of the process."""
PENDING: set[str] = set()
"""Faults that happen when the product next does what they break."""


def note(event: str, **facts: object) -> None:
    """Append one line in one write."""
    line = json.dumps({"event": event, "time_s": time.time(), "rank": RANK, "attempt": ATTEMPT, **facts}) + "\n"
    with (FOLDER / "events.jsonl").open("ab", buffering=0) as stream:
        stream.write(line.encode())


def _fired(number: int) -> Path:
    """The file that holds the attempt in which a fault took place."""
    return FOLDER / f"fired_{number}"


def is_due(fault: Mapping[str, Any], done: int) -> bool:
    """Whether `fault` is the next, on this rank, and the ranks have started again since the one before."""
    if fault["rank"] != RANK or done < fault["step"] or _fired(fault["number"]).exists():
        return False
    before = _fired(fault["number"] - 1)
    return fault["number"] == 0 or (before.exists() and int(before.read_text()) < ATTEMPT)


def take_place(fault: Mapping[str, Any]) -> None:
    """Do the damage."""
    _fired(fault["number"]).write_text(str(ATTEMPT))
    kind = fault["kind"]
    damaged = damage(kind) if kind in ("truncated", "corrupted") else ""
    note("fault", number=fault["number"], kind=kind, step=fault["step"], damaged=damaged)
    if kind in ("exception", "full disk"):
        PENDING.add(kind)
    else:
        os.kill(os.getpid(), signal.SIGSTOP if kind == "SIGSTOP" else signal.SIGKILL)


def damage(kind: str) -> str:
    """Cut a file of the newest whole checkpoint in half, or change one byte of it; the name of the checkpoint."""
    from mas_hpc.distributed.checkpoint_files import marked

    position = marked(RUN / "checkpoints")[-1].position
    file = sorted((RUN / "checkpoints" / position.name).glob("*.safetensors"))[RANK]
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.write_bytes(content[: len(content) // 2] if kind == "truncated" else content)
    return position.name


def plant_at_ends_of_steps() -> None:
    """Note every training step that is done, and let the faults of this rank happen after theirs."""
    from mas_hpc.phases.monitor import Monitor

    log, planted, ends_s = Monitor.log, set[int](), [time.monotonic()]

    def log_and_count(self: Any, step: int, metrics: Mapping[str, float]) -> None:
        log(self, step, metrics)
        if self._phase == "train":
            note("step", done=step + 1)
            ends_s.append(time.monotonic())
            step_s = min(ends_s[-1] - ends_s[-2], LONGEST_STEP_S)
            for fault in PLAN["faults"]:
                if fault["number"] not in planted and is_due(fault, step + 1):
                    planted.add(fault["number"])
                    threading.Timer(fault["delay"] * step_s, take_place, [fault]).start()

    Monitor.log = log_and_count  # type: ignore[method-assign]


def plant_in_what_breaks() -> None:
    """An exception where the next step says that it is there, and a disk that is full in the middle of the next checkpoint."""
    from mas_hpc.distributed import checkpoint_format
    from mas_hpc.distributed.watchdog import Watch

    at, write_tensors = Watch.at, checkpoint_format.write_tensors

    def be_there_or_break(self: Watch, phase: str, step: int = 0) -> None:
        if "exception" in PENDING:
            raise ValueError("planted by the drill")
        at(self, phase, step)

    def write_on_full_disk(file: Path, *what: Any) -> Any:
        if "full disk" in PENDING:
            file.write_bytes(b"half of it")
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(b"the other half")
        return write_tensors(file, *what)

    Watch.at = be_there_or_break  # type: ignore[method-assign]
    checkpoint_format.write_tensors = write_on_full_disk


if __name__ == "__main__":
    plant_at_ends_of_steps()
    plant_in_what_breaks()
    from mas_hpc.cli import main

    sys.argv[0] = "mas-hpc"
    main()
