"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

os.environ.pop("PYTHONUNBUFFERED", None)  # unbuffered Python writes a printed line in parts, which mix where ranks share a pipe


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets, beside the checkout; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
