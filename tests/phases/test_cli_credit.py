"""mas-hpc credit through the command line, on a tiny model: what it writes, what it remembers, what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from mas_hpc.cli import app, main
from mas_hpc.config import ModelConfig
from mas_hpc.data import trace_store
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.replay import replay
from mas_hpc.orchestration.sampling import Sampling
from tests.distributed.launch import run_ranks
from tests.phases.conftest import NUM_TASKS, ROOT, opened, rollout


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mas-hpc", "credit", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def test_a_reopened_run_has_the_weights_that_its_traces_were_sampled_from(folder: Path) -> None:
    run = opened(folder)
    for trace in trace_store.read(folder / "traces" / "rollout.jsonl"):
        again = replay(run.engine, trace.task, trace.path, run.team, Sampling(temperature=1.0))
        assert [completion.token_ids for completion in again] == [turn.completion_ids for turn in trace.path]


ASKED = [
    ("shapley", "removal"), ("shapley", "masked"), ("shapley", "resample"), ("shapley", "replacement"), ("loo", "resample"),
    ("reward_blame", "masked"), ("first_error", "removal"), ("local", "removal"), ("outcome", "removal"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "value"), ASKED)
def test_every_method_runs_and_a_second_call_samples_nothing(cli, folder: Path, method: str, value: str) -> None:
    words = (folder, "--method", method, "--value", value, "--replays", 1)
    words += ("--base", folder / "model") if value == "replacement" else ()
    code, out, err = cli(*words)
    assert code == 0, err
    assert f"rollout: {NUM_TASKS} traces credited" in out and f"report: {folder}" in out.replace("\n", "")
    name = f"{method}-{value}" if method in ("shapley", "loo", "reward_blame") else method
    results = json.loads((folder / "credit" / name / "summary.json").read_text())
    assert f"<h3>{name}</h3>" in (folder / "report.html").read_text()
    assert (results["requests"]["sampled"] > 0) == (method not in ("local", "outcome"))
    if method != "reward_blame":  # which has Shapley values of right answers alone
        assert ("Shapley value" in out, "leave-one-out" in out) == (method == "shapley", method == "loo")
    code, out, _ = cli(*words)
    again = json.loads((folder / "credit" / name / "summary.json").read_text())
    assert code == 0 and again["requests"]["sampled"] == 0
    assert again | {"requests": None} == results | {"requests": None}
    assert ("Nothing sampled" in out) == (method not in ("local", "outcome"))


def test_outcomes_under_another_base_model_are_others_wherever_it_lies(cli, folder: Path) -> None:
    def sampled(base: Path) -> int:
        code, _, err = cli(folder, "--value", "replacement", "--replays", 1, "--base", base)
        assert code == 0, err
        return json.loads((folder / "credit" / "shapley-replacement" / "summary.json").read_text())["requests"]["sampled"]

    assert sampled(folder / "model") > 0
    assert sampled(shutil.copytree(folder / "model", folder / "moved")) == 0
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    model.save_pretrained(folder / "moved")
    assert sampled(folder / "moved") > 0


@pytest.fixture(scope="module")
def prm(runs: Path) -> Path:
    words = ("model.hidden_size=32", "data.num_digits=3", "data.num_train=12", "data.num_test=8", "method.steps=1")
    app(["train", str(ROOT / "configs" / "prm.yaml"), *words, f"runs_dir={runs}", "name=prm"], standalone_mode=False)
    return runs / "prm" / "model"


def test_a_process_reward_model_credits_every_message(cli, folder: Path, prm: Path) -> None:
    code, _, err = cli(folder, "--method", "process_reward", "--reward-model", prm)
    assert code == 0, err
    for trace in trace_store.read(folder / "traces" / "credit-process_reward.jsonl"):
        assert all(turn.credit is not None and 0 < turn.credit < 1 for turn in trace.path)


@pytest.mark.slow
def test_two_ranks_read_a_process_reward_model_as_one_does(cli, folder: Path, prm: Path) -> None:
    words = ("--method", "process_reward", "--reward-model", str(prm))

    def credits() -> dict[tuple[str, str], float]:
        traces = trace_store.read(folder / "traces" / "credit-process_reward.jsonl")
        return {(trace.task.id, turn.id): turn.credit for trace in traces for turn in trace.path}

    assert cli(folder, *words)[0] == 0
    expected = credits()
    done = run_ranks("torchrun", 2, "-m", "mas_hpc", "credit", str(folder), *words)
    assert done.returncode == 0, done.stderr
    assert credits() == pytest.approx(expected, rel=1e-5) and len(set(expected.values())) > 1


def test_adapters_come_off_for_agents_that_are_replaced(cli, runs: Path, tmp_path: Path) -> None:
    folder = rollout(runs, "adapters", "adapters.policies=per_agent", "rollout.num_tasks=2")
    code, _, err = cli(folder, "--value", "replacement", "--replays", 1)
    assert code == 0, err
    assert opened(folder).bank is not None
    results = json.loads((folder / "credit" / "shapley-replacement" / "summary.json").read_text())
    assert all(entry["phi"]["n"] == 2 for entry in results["agents"].values())


def edited(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def only_unfinished(folder: Path) -> None:
    file = folder / "traces" / "rollout.jsonl"
    traces = [replace(trace, reward=None) for trace in trace_store.read(file)]
    file.unlink()
    trace_store.write(file, traces)


def of_another_team(folder: Path) -> None:
    file = folder / "traces" / "rollout.jsonl"
    file.write_text(file.read_text().replace('"agent":"critic"', '"agent":"auditor"'))


def another_vocabulary(folder: Path) -> None:
    _, tokenizer = load_model(ModelConfig(hidden_size=32, num_heads=2), seed=0)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    tokenizer.add_tokens(["x"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder / "foreign")
    tokenizer.save_pretrained(folder / "foreign")


def damaged(folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "foreign")
    edited(folder, "foreign/model.safetensors", "not weights")


MISTAKES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, (), ("no config.yaml there; expected the folder of a run",)),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), (), ("no config.yaml there",)),
    "no such traces": (lambda folder: None, ("--traces", "rolout"), ("--traces rolout: no ", "expected one of ['rollout']")),
    "no traces": (lambda folder: shutil.rmtree(folder / "traces"), (), ("no traces of a rollout", "one of []")),
    "another version": (
        lambda folder: edited(folder, "policy_version.json", "3"), (),
        ("rollout.jsonl: turns of policy versions 0 to 0, but the run's weights are of version 3", "or roll out again"),
    ),
    "alternatives of another version": (
        lambda folder: edited(folder, "policy_version.json", "3"), ("--method", "local", "--resamples", "1", "--pairs", "all"),
        ("the run's weights are of version 3",),
    ),
    "weights not saved": (lambda folder: shutil.rmtree(folder / "model"), (), ("were not saved; expected", "run it again")),
    "unfinished": (only_unfinished, (), (f"no trace that can get credit: {NUM_TASKS} unfinished", "roll out again")),
    "empty": (lambda folder: edited(folder, "traces/rollout.jsonl", ""), (), ("credit: the file is empty",)),
    "another team": (of_another_team, (), ("turns of agents ['auditor']", "['solver', 'critic', 'reviser', 'verifier']")),
    "nothing replaces": (lambda folder: None, ("--value", "replacement"), ("give --base MODEL",)),
    "another vocabulary": (
        another_vocabulary, ("--value", "replacement", "--base", "foreign"),
        ("--base=", "its vocabulary is not that of model.path", "choose models of one family"),
    ),
    "no model to replace by": (
        lambda folder: (folder / "foreign").mkdir(), ("--value", "replacement", "--base", "foreign"),
        ("error: --base='", "foreign': the folder holds no model", "expected config.json, *.safetensors and tokenizer files"),
    ),
    "a damaged model to replace by": (
        damaged, ("--value", "replacement", "--base", "foreign"),
        ("error: --base='", "foreign': damaged weights", "copy the model again"),
    ),
    "no PRM": (lambda folder: None, ("--method", "process_reward"), ("--reward-model: required", "method.kind=prm")),
    "PRM is a policy": (
        lambda folder: None, ("--method", "process_reward", "--reward-model", "model"), ("no reward_model.json there",),
    ),
    "damaged values": (
        lambda folder: edited(folder, "credit/values.rank0.jsonl", "{}\n"), (), ("values.rank0.jsonl:1: ", "remove it"),
    ),
    "damaged traces": (
        lambda folder: edited(folder, "traces/rollout.jsonl", "{}\n"), (), ("rollout.jsonl:1: ", "collect again"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_the_remedy(cli, folder: Path, mistake: str) -> None:
    make, words, expected = MISTAKES[mistake]
    make(folder)
    code, _, err = cli(folder, *(folder / word if word in ("foreign", "model") else word for word in words))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in expected), err


WITHOUT_EFFECT = {
    "--value masked": "--method first_error",
    "--base some/model": "",
    "--base this/model": "--method outcome",
    "--localizer checks": "--method shapley",
    "--reward-model some/prm": "--method first_error --localizer checks",
    "--epsilon 0.25": "--method loo",
    "--resamples 2 --pairs faults": "--method outcome",
    "--pairs all": "--method outcome",
}
REMEDIES = {
    "--value masked": "use --method loo or shapley or reward_blame",
    "--base some/model": "add --value replacement",
    "--base this/model": "use --method loo or shapley or reward_blame, with --value replacement",
    "--localizer checks": "use --method first_error or reward_blame",
    "--reward-model some/prm": "use --method process_reward, or --method first_error or reward_blame with --localizer prm",
    "--epsilon 0.25": "use --method first_error or reward_blame",
    "--resamples 2 --pairs faults": "use --method first_error or reward_blame, or --pairs all",
    "--pairs all": "add --resamples",
}


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_an_option_that_nothing_would_read_is_refused(cli, tmp_path: Path, option: str) -> None:
    code, _, err = cli(tmp_path, *option.split(), *WITHOUT_EFFECT[option].split())
    assert (code, err) == (1, f"error: {option}: without effect here; {REMEDIES[option]}, or leave it out\n")


def test_methods_that_replay_nothing_take_traces_of_any_version(cli, folder: Path) -> None:
    edited(folder, "policy_version.json", "3")
    for method in ("local", "outcome"):
        assert cli(folder, "--method", method)[0] == 0
