"""JSON lines on disk: appended whole, so that a killed run leaves every earlier line readable."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from mas_hpc.errors import DataError

_logger = logging.getLogger(__name__)


def append(path: str | Path, lines: Sequence[str], *, noun: str, sync: bool = True) -> None:
    """Append the lines (ASCII, without newlines), each in one write. One writer a file.

    The lines outlive this process as they are; with `sync`, they and those before them are forced to disk and outlive the host.
    Raises DataError when the file cannot be written, such as on a full disk: the lines before stay intact.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b", buffering=0) as stream:
            _mend_tail(stream)
            for line in lines:
                _write_line(stream, line.encode("ascii") + b"\n")
            if sync:
                os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(
            f"{file}: cannot append {noun}: {error.strerror}; expected a writable file and free space. "
            "The lines written earlier are intact: make room and run again"
        ) from None


def is_json(line: bytes) -> bool:
    """Whether the line is whole."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _mend_tail(stream: BinaryIO) -> None:
    """End the file with a newline: a whole last line gets one, a torn one is cut off."""
    if (size := stream.seek(0, os.SEEK_END)) == 0:
        return
    stream.seek(size - 1)
    if stream.read(1) == b"\n":
        return
    stream.seek(0)
    content = stream.read()
    start = content.rfind(b"\n") + 1
    if is_json(content[start:]):
        stream.write(b"\n")
        return
    stream.truncate(start)
    _logger.warning("%s: %d bytes of an incomplete last line removed before appending", stream.name, size - start)


def _write_line(stream: BinaryIO, line: bytes) -> None:
    """A raw write may take only a part, as a nearly full disk does; the next one then raises."""
    while line:
        line = line[stream.write(line) :]
