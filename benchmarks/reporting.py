"""What every benchmark shares: rows of ours against a named peer, written as JSON and printed as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. `target` is the least ratio that was promised.

    Example: Row(case="one tree", metric="cpu_s", ours=10.0, peer="sdpa rows", theirs=45.0, ratio=4.5, target=4.2)
    """

    case: str
    metric: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    """Larger is better for us: theirs / ours for times and memory, ours / theirs for rates and accuracies."""
    target: float

    @property
    def holds(self) -> bool:
        return self.ratio >= self.target


def cost_row(*, case: str, metric: str, ours: float, peer: str, theirs: float, target: float) -> Row:
    """A row of a metric of which less is better."""
    return Row(case=case, metric=metric, ours=ours, peer=peer, theirs=theirs, ratio=theirs / ours, target=target)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all threads, spent in `work`: what other load on the machine inflates least."""
    start = time.process_time()
    work()
    return time.process_time() - start


def alternate(measures: Sequence[Callable[[], float]], *, repeats: int = 3) -> list[float]:
    """Medians of measurements taken in turn (ours, theirs, ours, theirs, ...), so that drift hits all alike."""
    rounds = [[measure() for measure in measures] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def host() -> dict[str, str | int]:
    """Processor, cores, memory and system; no name."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory_bytes / 2**30),
        "system": platform.system(),
        "machine": platform.machine(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions, Python's included; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, with "+changes" when the tree differs from it; "" outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", "mas_hpc", "kernels", "benchmarks/*.py") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return ""


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def report(name: str, rows: Sequence[Row], *, notes: Mapping[str, str]) -> Path:
    """Write benchmarks/results/<name>.json, print the rows, return the file. `notes` says how it was measured."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "host": host(),
        "versions": versions(),
        "commit": commit(),
        "notes": dict(notes),
        "rows": [asdict(row) | {"holds": row.holds} for row in rows],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    Console().print(table(name, rows))
    return path


def table(name: str, rows: Sequence[Row]) -> Table:
    """The rows as they are printed."""
    result = Table(Column("case", overflow="fold"), "metric", "ours", "peer", "theirs", "ratio", "target", "holds", title=name)
    for row in rows:
        numbers = [f"{number:.4g}" for number in (row.ours, row.theirs, row.ratio, row.target)]
        verdict = "yes" if row.holds else "NO"
        result.add_row(row.case, row.metric, numbers[0], row.peer, numbers[1], numbers[2], numbers[3], verdict)
    return result
