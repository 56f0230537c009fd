import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mas_hpc.cli import app
from mas_hpc.config import RunConfig
from mas_hpc.data import trace_store
from mas_hpc.errors import ConfigError
from mas_hpc.phases.scale import lengths_of
from mas_hpc.scaling.report import parse_nodes
from mas_hpc.types import Task, Trace, Turn

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "at_grpo.yaml")


def scale(*words: str) -> str:
    done = CliRunner().invoke(app, ["scale", *words])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def test_numbers_of_nodes() -> None:
    assert parse_nodes("1..10", 100) == (1, 2, 4, 8, 10)
    assert parse_nodes("3..3", 100) == (3,)
    assert parse_nodes("8, 4,6", 100) == (4, 6, 8)
    for wrong in ("0..4", "4..2", "four", "", "1...4"):
        with pytest.raises(ConfigError, match="expected numbers"):
            parse_nodes(wrong, 100)
    with pytest.raises(ConfigError, match="the site has 100 nodes"):
        parse_nodes("1..101", 100)


def test_the_table_says_what_fits_what_limits_and_what_to_change() -> None:
    out = scale(CONFIG, "--nodes", "4,64", "--shape", "agpt-70b", "model.dtype=bfloat16")
    assert " NO " in out
    assert "distributed.strategy=fsdp2" in out
    assert "fitted on published points" in out


def test_json_and_plot_hold_the_same_predictions(tmp_path: Path) -> None:
    file = tmp_path / "scale.svg"
    out = scale(CONFIG, "--nodes", "1..16", "--weak", "--json", "--plot", str(file))
    rows = json.loads(out)["rows"]
    assert [row["nodes"] for row in rows] == [1, 2, 4, 8, 16]
    assert rows[0]["efficiency"] == 1.0
    assert all(row["low"] < row["seconds"] < row["high"] for row in rows)
    ET.parse(file)
    assert ">16<" in file.read_text()
    done = CliRunner().invoke(app, ["scale", CONFIG, "--plot", "scale.png"])
    assert isinstance(done.exception, ConfigError)
    assert ".svg or .html" in str(done.exception)


def test_scale_leaves_torch_out() -> None:
    code = f"import sys; from mas_hpc.cli import app; app(['scale', {CONFIG!r}, '--nodes', '4'], standalone_mode=False); " \
        "sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_lengths_come_from_traces(tmp_path: Path) -> None:
    def turn(index: int, prompt: int, completion: int) -> Turn:
        return Turn(
            id=f"q/{index}", parent=None, task_id="q", agent="a", policy="shared", index=index, prompt_ids=(0,) * prompt,
            prompt_spans=(("", prompt),), completion_ids=(1,) * completion, behavior_logprobs=(-1.0,) * completion, text="",
            finish="stop", policy_version=0, seed=0,
        )  # fmt: skip

    task = Task(id="q", question="?", answer="1")
    trace_store.write(tmp_path / "traces.jsonl", [Trace(task=task, turns=(turn(0, 10, 4), turn(1, 30, 8)))])
    found = lengths_of(RunConfig(), tmp_path / "traces.jsonl", 200.0, 0.0)
    assert (found.question, found.completion, found.observed) == (10, 6, (4, 8))


@pytest.mark.slow
def test_two_ranks_calibrate_and_their_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    words = [sys.executable, "-m", "mas_hpc", "calibrate", "-n", "2", "-o", str(file)]
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    out = scale(CONFIG, "--site", "laptop", "--nodes", "1", "--calibration", str(file))
    assert "measured on 2 ranks" in out
