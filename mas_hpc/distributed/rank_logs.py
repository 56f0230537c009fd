"""A file for the output of each rank: what thousands of ranks say does not all travel to the host that started them.

The file takes the place of stdout and stderr themselves, so that what libraries and dying processes say is in it too; lines
that Python writes begin with the time. The first rank goes on talking to whoever started it as well.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from mas_hpc.distributed.world import World, log_folder


def log_to_file(world: World) -> World:
    """Send this process's output to its rank's file from here on, if whoever started the ranks asks for it; the same world."""
    folder = log_folder()
    if folder is None:
        return world
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    beside = os.fdopen(os.dup(1), "w", buffering=1, errors="replace") if world.is_first else None
    file = os.open(log_file(folder, world.rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout, sys.stderr = Stamped(1, beside), Stamped(2, beside)
    print(f"rank {world.rank} of {world.size}, attempt {world.attempt}, process {os.getpid()}", file=sys.stderr)
    return world


def log_file(folder: Path, rank: int) -> Path:
    """Of a rank, in the folder of all."""
    return folder / f"rank_{rank:04}.log"


class Stamped(io.TextIOBase):
    """A stream to a file descriptor whose lines begin with the time in UTC, written when they end or are flushed."""

    def __init__(self, descriptor: int, beside: TextIO | None) -> None:
        """`beside` gets the same text, without times."""
        self._descriptor, self._beside = descriptor, beside
        self._line = ""

    def write(self, text: str) -> int:
        """See io."""
        if self._beside:
            self._beside.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._put(line)
        return len(text)

    def flush(self) -> None:
        """See io."""
        if self._line:
            self._put(self._line)
            self._line = ""

    def fileno(self) -> int:
        """Of the file, for faulthandler."""
        return self._descriptor

    def writable(self) -> bool:
        """See io."""
        return True

    def _put(self, line: str) -> None:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}"
        os.write(self._descriptor, f"{stamp} {line}\n".encode(errors="replace"))
