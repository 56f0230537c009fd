"""mas-hpc train and pipeline --resume, as a user meets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mas_hpc.cli import main
from mas_hpc.phases import evaluation
from mas_hpc.phases.keeping import Keeper
from mas_hpc.run import lock_folder
from tests.phases.resuming import METHODS, ROOT, SMALL, assert_same_run, metrics

SFT, AT_GRPO = str(ROOT / "configs" / "sft.yaml"), str(ROOT / "configs" / "quickstart.yaml")
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Exit code, and all that was said."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mas-hpc", *words, *SMALL, f"runs_dir={tmp_path}", "method.steps=4"])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), " ".join((captured.out + captured.err).split())

    return call


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> pytest.MonkeyPatch:
    keep = Keeper.keep

    def keep_and_stop(keeper: Keeper, number: int) -> None:
        keep(keeper, number)
        if (keeper._phase, number) == ("train", step):
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "keep", keep_and_stop)
    return monkeypatch


def test_an_interrupted_pipeline_goes_on_to_the_same_results(
    cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pipeline", AT_GRPO, *METHODS["at_grpo"], "evaluation.temperatures=[1.0]")
    code, said = cli(*words, "name=whole")
    assert code == 0, said
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert cli(*words, "name=stopped")[0] == 130
    evaluated: list[str] = []
    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda run, phase: evaluated.append(phase) or evaluate(run, phase))
    code, said = cli(*words, "name=stopped", "--resume", str(tmp_path / "stopped"))
    assert code == 0 and "train: goes on after step 2/4" in said, said
    assert evaluated == ["after"], "the rows before training are there"
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "stopped"))
    assert one == other


def test_what_came_after_an_earlier_step_comes_again(cli: Call, tmp_path: Path) -> None:
    words = ("pipeline", AT_GRPO, *METHODS["at_grpo"], "evaluation.temperatures=[1.0]", "evaluation.controls=false", "name=run")
    assert cli(*words)[0] == 0
    after = tmp_path / "run" / "traces" / "after-T1.jsonl"
    before, lines = after.read_text(), [line["phase"] for line in metrics(tmp_path / "run")]
    after.write_text(before.splitlines()[0] + "\n")  # of weights that are not those of the run that goes on
    code, said = cli(*words, "--resume", str(tmp_path / "run"), "--resume-step", "2")
    assert code == 0 and "traces are there from before the restart" not in said.partition("train: goes on")[2], said
    assert len(after.read_text().splitlines()) == len(before.splitlines())
    assert [line["phase"] for line in metrics(tmp_path / "run")] == lines


def test_going_on_with_a_finished_run_or_one_that_is_live_is_one_message(cli: Call, tmp_path: Path) -> None:
    words = ("train", SFT, *METHODS["sft"], "name=run")
    going_on = ("--resume", str(tmp_path / "run"))
    assert cli(*words)[0] == 0
    with lock_folder(tmp_path / "run"):
        code, said = cli(*words, *going_on)
        assert code != 0 and "another run is writing there" in said
    code, said = cli(*words, *going_on)
    assert code != 0 and "finished (train, 4 of 4 steps): nothing is left to do" in said
    code, said = cli(*words, "--resume-step", "2")
    assert code != 0 and "add --resume FOLDER" in said
