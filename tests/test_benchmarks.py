"""Benchmarks start as `mas-hpc bench` starts them, and their results are in the format that the README quotes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("bench_*.py")), ids=lambda f: f.stem)
def test_a_benchmark_loads_as_a_script(file: Path) -> None:
    code = f"import sys, runpy; sys.path.insert(0, {str(FOLDER)!r}); runpy.run_path({str(file)!r}, run_name='loaded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda f: f.stem)
def test_results_say_whether_each_row_holds(file: Path) -> None:
    document = json.loads(file.read_text())
    assert {"host", "versions", "commit", "rows"} <= document.keys()
    for row in document["rows"]:
        assert {"case", "metric", "ours", "peer", "theirs", "ratio", "target", "holds"} <= row.keys()
        assert row["holds"] == (row["ratio"] >= row["target"])
