"""What one strategy has trained, another goes on with; a step that was skipped or had nothing to learn leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.state_ranks import STRATEGIES

SCRIPT = Path(__file__).with_name("state_ranks.py")
ROUNDING = 1e-6
"""Of weights and states around 1 after three steps; a step of AdamW moves a weight by 0.01."""


@pytest.mark.slow
def test_every_strategy_goes_on_from_what_another_has_kept(tmp_path: Path) -> None:
    done = run_ranks("torchrun", 2, str(SCRIPT), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in STRATEGIES:
            assert found[name].pop("state at the start") == 0.0
            assert len(found[name]) == 6
            assert {what: difference for what, difference in found[name].items() if not difference < ROUNDING} == {}, name
            assert found[f"{name} refuses"].startswith("method.optimizer=adafactor: ")
