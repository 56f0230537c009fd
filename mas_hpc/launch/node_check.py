"""What a node says of itself before ranks start there; runs on every node, from a shared file system, so it imports little.

Run: python -m mas_hpc.launch.node_check SCRATCH GIB DEVICE COUNT NUMBER
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
from pathlib import Path

DEVICE_FILES = {"xpu": "/dev/dri/renderD*", "cuda": "/dev/nvidia[0-9]*"}
"""Of each card: they are counted without torch, whose import by every node is what staging is to spare."""


def main() -> None:
    """Print one JSON line: the node's number, its name, and what is wrong with it."""
    scratch, need_gib, device, count, number = sys.argv[1:]
    problems = check_scratch(Path(scratch), float(need_gib)) + check_devices(device, int(count))
    print(json.dumps({"node": int(number), "name": socket.gethostname(), "problems": problems}), flush=True)


def check_scratch(folder: Path, need_gib: float) -> list[str]:
    """Whether a file can be written there, and there is room."""
    try:
        free_gib = shutil.disk_usage(folder).free / 2**30
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    return [f"{folder}: {free_gib:.1f} GiB free, {need_gib:.1f} needed"] if free_gib < need_gib else []


def check_devices(device: str, count: int) -> list[str]:
    """Whether all cards are there; of a CPU there is nothing to count."""
    if device not in DEVICE_FILES:
        return []
    root, pattern = Path("/dev"), DEVICE_FILES[device].removeprefix("/dev/")
    found = len(list(root.glob(pattern)))
    return [f"{found} cards ({DEVICE_FILES[device]}), expected {count}"] if found < count else []


if __name__ == "__main__":
    main()
