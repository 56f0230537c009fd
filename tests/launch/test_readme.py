"""The table of traps is whole, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "mas_hpc/launch/README.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \| ", line)
]


def test_every_trap_has_its_row() -> None:
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 29))
    assert all(len(row) == 4 and all(row) for row in ROWS)


def test_every_row_names_a_test_that_there_is_or_a_reason() -> None:
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for number, _, prevented, tested in ROWS:
        names = re.findall(r"`(test_\w+)`", tested)
        assert names or (prevented == "-" and tested.startswith("not by")), number
        assert all(f"def {name}(" in tests for name in names), number


def test_every_file_that_prevents_a_trap_is_there() -> None:
    files = {name for row in ROWS for name in re.findall(r"`([\w/]+\.(?:py|yaml))`", row[2])}
    missing = [
        name for name in files if not any((ROOT / "mas_hpc" / base / name).is_file() for base in ("", "launch", "distributed"))
    ]
    assert not missing and len(files) > 10
