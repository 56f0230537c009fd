"""Whether an environment stands alone: run with -c by the interpreter of its copy on a node.

Arguments: the copy's folder, and folders of file systems that all nodes share. What is read from there, every rank reads from
there; what is read from where the environment was made is there on the machine that made it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

NETWORK = {"lustre", "nfs", "nfs4", "gpfs", "beegfs", "ceph", "dvs", "panfs", "afs", "cifs", "smb3", "fuse.daos", "fuse.sshfs"}
"""Types of file systems that are not of the node itself."""


def main() -> None:
    """Import what ranks import, and look where it came from. Ends with a message for what is elsewhere."""
    copy = Path(sys.argv[1]).resolve()
    import torch  # noqa: F401

    import mas_hpc  # noqa: F401

    foreign = {Path(folder).resolve(): f"the shared file system {folder}" for folder in sys.argv[2:]}
    foreign |= {folder: f"a shared file system ({kind})" for folder, kind in _network_mounts()}
    foreign |= {folder: f"{folder}, where it was made" for folder in _made_in(copy)}
    for place in dict.fromkeys(_places()):
        path = Path(place).resolve()
        found = next((what for folder, what in foreign.items() if path.is_relative_to(folder)), "")
        if found and not path.is_relative_to(copy):
            sys.exit(
                f"{place} is on {found}: what is staged has to be relocatable, with its own interpreter and packages "
                "(conda-pack, or a venv whose packages are no links and are not installed with -e)"
            )


def _places() -> Iterator[str]:
    """All that this process has been read from, and would look for modules in."""
    yield from (sys.executable, sys.prefix, sys.base_prefix)
    yield from (entry for entry in sys.path if entry and Path(entry).exists())
    yield from (file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None)))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if (start := line.find("/")) >= 0 and not line.endswith(" (deleted)"):
            yield line[start:]


def _network_mounts() -> Iterator[tuple[Path, str]]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, *_ = line.split(" ")
        if kind in NETWORK and folder != "/":
            yield Path(folder.replace("\\040", " ")), kind


def _made_in(copy: Path) -> set[Path]:
    """Folders that first lines of the copy's own scripts name as that of their interpreter: where it was before."""
    found = set[Path]()
    for script in (copy / "bin").iterdir():
        if script.is_file():
            with script.open("rb") as stream:
                line = stream.readline(1000).decode(errors="replace")
            if match := re.match(r"#!(/\S+)/bin/python[\d.]*\s*$", line):
                found.add(Path(match[1]))
    return found - {copy, Path("/usr"), Path("/usr/local"), Path("/")}


if __name__ == "__main__":
    main()
