"""Training, rollout and held-out looks run on a device that is not the CPU: no tensor is left behind on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, environment


@pytest.mark.slow
def test_no_tensor_stays_on_the_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.foreign_device_runs", str(tmp_path)], capture_output=True, text=True, check=False,
        cwd=ROOT, env=environment(), timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        on_cpu, on_device = json.loads(line)
        assert len(on_cpu) >= 6 and any(on_cpu)
        assert on_device == pytest.approx(on_cpu, rel=1e-4, abs=1e-6)
