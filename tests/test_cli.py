"""The command line as a user meets it: the main job end to end, and one clear message for each mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mas_hpc.cli import main
from mas_hpc.data import trace_store
from mas_hpc.distributed.world import World
from mas_hpc.run import claim_folder

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL = (
    "model.hidden_size=32", "warm_start.steps=2", "warm_start.batch_size=4", "method.steps=2", "method.tasks_per_step=4",
    "method.group_size=2", "evaluation.num_tasks=6", "data.num_train=40", "data.num_test=10",
)  # fmt: skip


TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mas_hpc"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mas_hpc", *words]


def run(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mas-hpc", *words])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def call(*words: str) -> tuple[int, str, str]:
        where = [f"runs_dir={tmp_path / 'runs'}"] if len(words) > 1 and words[1].endswith(".yaml") else []
        return run(*words, *where, capsys=capsys, monkeypatch=monkeypatch)

    return call


def metrics(folder: Path, phase: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def test_the_pipeline_evaluates_trains_evaluates_and_reports(cli, tmp_path: Path) -> None:
    code, out, err = cli("pipeline", QUICKSTART, *SMALL)
    folder = tmp_path / "runs" / "quickstart"
    assert code == 0, err
    results = json.loads((folder / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names.count("team, before training") == names.count("team, after training") == 2
    assert any(name.startswith("majority vote") for name in names) and any(name.startswith("best of") for name in names)
    assert len(metrics(folder, "warm_start")) == 2 and len(metrics(folder, "train")) == 2
    assert {"reward/solver", "degenerate/reviser", "loss", "grad_norm"} <= metrics(folder, "train")[0].keys()
    traces = list(trace_store.read(folder / "traces" / "train.jsonl"))
    assert len(traces) == 8
    assert all(turn.credit is not None for trace in traces for turn in trace.turns)
    assert {turn.policy_version for turn in traces[-1].turns} == {1}
    for name in ("report.html", "config.yaml", "model/model.safetensors"):
        assert (folder / name).is_file()
    assert f"report: {folder}" in out.replace("\n", "")


def test_a_second_run_of_the_same_name_gets_its_own_folder(cli, tmp_path: Path) -> None:
    for expected in ("quickstart", "quickstart-2"):
        code, _, err = cli("rollout", QUICKSTART, *SMALL, "rollout.num_tasks=3")
        assert code == 0, err
        assert len(list(trace_store.read(tmp_path / "runs" / expected / "traces" / "rollout.jsonl"))) == 3


def test_adapters_per_agent_train_are_saved_and_load_again(cli, tmp_path: Path) -> None:
    per_agent = ("adapters.policies=per_agent", "adapters.rank=2", "adapters.scope=speaker", "warm_start.steps=0")
    code, _, err = cli("train", QUICKSTART, *SMALL, *per_agent)
    assert code == 0, err
    saved = tmp_path / "runs" / "quickstart" / "adapters"
    assert sorted(path.name for path in saved.iterdir()) == ["critic", "reviser", "solver", "verifier"]
    code, out, err = cli("evaluate", QUICKSTART, *SMALL, *per_agent, f"adapters.path={saved}")
    assert code == 0 and "team" in out, err


def test_adapters_on_a_warm_started_base_bring_the_base_along(cli, tmp_path: Path) -> None:
    per_agent = ("adapters.policies=per_agent", "adapters.rank=2", "evaluation.temperatures=[1.0]", "evaluation.controls=false")
    assert cli("pipeline", QUICKSTART, *SMALL, *per_agent)[0] == 0
    first = tmp_path / "runs" / "quickstart"
    config = json.loads((first / "adapters" / "solver" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first / "model")
    saved = (f"model.path={first / 'model'}", f"adapters.path={first / 'adapters'}", "warm_start.steps=0")
    code, _, err = cli("evaluate", QUICKSTART, *SMALL, *per_agent, *saved)
    assert code == 0, err
    rows = [
        row["right"]
        for name, phase in (("quickstart", "after"), ("quickstart-2", ""))
        for row in json.loads((tmp_path / "runs" / name / "results.json").read_text())["rows"]
        if row["phase"] == phase
    ]
    assert rows[0] == rows[1]
    files = (first / "traces" / "after-T1.jsonl", tmp_path / "runs" / "quickstart-2" / "traces" / "evaluate-T1.jsonl")
    after, again = ([turn.text for trace in trace_store.read(file) for turn in trace.path] for file in files)
    assert after == again


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "exists", lambda self: False)  # the other process made it after we looked
    assert claim_folder(tmp_path / "a", World()) == tmp_path / "a-2"


def test_a_trained_model_is_evaluated_by_its_path(cli, tmp_path: Path) -> None:
    assert cli("train", QUICKSTART, *SMALL)[0] == 0
    code, _, err = cli("evaluate", QUICKSTART, *SMALL, "warm_start.steps=0", f"model.path={tmp_path}/runs/quickstart/model")
    assert code == 0, err


def test_a_single_agent_is_evaluated_beside_its_vote(cli, tmp_path: Path) -> None:
    code, out, err = cli("evaluate", QUICKSTART, *SMALL, "team.topology=single", "method.agent_weights={}")
    assert code == 0 and "majority vote of 1" in out, err
    rows = json.loads((tmp_path / "runs" / "quickstart" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["team", "team", "majority vote of 1"], "nothing was trained: no before, no after"


def test_sft_is_a_method_of_its_own(cli, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "sft.yaml")
    code, _, err = cli("train", config, "model.hidden_size=32", "method.steps=2", "data.num_train=40", "data.num_test=10")
    assert code == 0, err
    assert len(metrics(tmp_path / "runs" / "sft", "train")) == 2


def test_a_team_reward_that_centring_erases_is_said_in_the_log(cli) -> None:
    code, out, _ = cli("train", QUICKSTART, *SMALL, "method.alpha=0.5")
    assert code == 0
    assert "which group centring erases" in out.replace("\n", " ")


def test_metrics_go_to_tensorboard_when_asked(cli, tmp_path: Path) -> None:
    code, _, err = cli("train", QUICKSTART, *SMALL, "tracking=tensorboard")
    assert code == 0, err
    [events] = (tmp_path / "runs" / "quickstart" / "tensorboard").iterdir()
    assert b"reward/solver" in events.read_bytes()


def test_check_prints_the_plan_and_config_the_reference(cli) -> None:
    code, out, _ = cli("check", QUICKSTART)
    assert code == 0 and "at_grpo, 80 steps" in out
    code, out, _ = cli("config")
    assert code == 0 and "method.group_size" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "configs/quickstrat.yaml"), "no such file"),
        (("check", QUICKSTART, "method.group_size=1"), "method.group_size=1: Input should be greater than or equal to 2"),
        (("check", QUICKSTART, "method.stepz=1"), "method.stepz: unknown key; did you mean steps?"),
        (("pipeline", QUICKSTART, "model.path=no/such/model"), "model.path"),
        (("train", QUICKSTART, "rollout.top_k=5"), "training needs top_p=1, top_k=0"),
        (("pipeline", QUICKSTART, "data.num_train=9000"), "only 8192 exist"),
        (("train", QUICKSTART, *SMALL, "method.tasks_per_step=4", "data.num_train=0"), "data.num_train=0"),
        (("evaluate", str(ROOT / "configs" / "mas.yaml"), "model.path=tiny", "data.path=missing.jsonl"), "missing.jsonl"),
        (("train", QUICKSTART, *SMALL, "data.num_train=3"), "there are 3 training questions"),
        (("report", "runs/none"), "runs/none"),
        (("bench", "nothing"), "expected one of"),
        (("train", QUICKSTART, *SMALL, "adapters.policies=per_agent", "adapters.target_modules=[nope]"), "nope"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_exit_one(cli, words: tuple[str, ...], message: str) -> None:
    code, _, err = cli(*words)
    assert code == 1
    assert message in err and "Traceback" not in err


def test_wrong_columns_and_empty_files_name_the_file(cli, tmp_path: Path) -> None:
    wrong, empty = tmp_path / "wrong.jsonl", tmp_path / "empty.jsonl"
    wrong.write_text('{"q": "1+1", "a": "2"}\n')
    empty.write_text("")
    for file, message in ((wrong, "question"), (empty, "empty")):
        code, _, err = cli(
            "rollout", str(ROOT / "configs" / "mas.yaml"), "model.path=tiny", "data.kind=jsonl", f"data.path={file}"
        )
        assert code == 1 and file.name in err and message in err


def test_a_text_task_for_the_tiny_model_is_refused_with_the_remedy(cli, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"question": "What is 1+1?", "answer": "2"}\n{"question": "What is 1+2?", "answer": "3"}\n')
    code, _, err = cli(
        "rollout",
        str(ROOT / "configs" / "mas.yaml"),
        "model.path=tiny",
        "data.kind=jsonl",
        f"data.path={file}",
        "data.num_test=1",
    )
    assert code == 1 and "set model.path to a model with a chat template" in err


def test_prompts_longer_than_the_context_are_values_not_crashes(cli, tmp_path: Path) -> None:
    assert cli("train", QUICKSTART, *SMALL)[0] == 0
    model = tmp_path / "runs" / "quickstart" / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    code, out, err = cli("rollout", QUICKSTART, *SMALL, "warm_start.steps=0", f"model.path={model}", "rollout.num_tasks=2")
    assert code == 0, err
    assert "4 failed turns" in out
    [trace, _] = trace_store.read(tmp_path / "runs" / "quickstart-2" / "traces" / "rollout.jsonl")
    assert [turn.finish for turn in trace.path] == ["length", "length", "error", "error"]
    assert "30" in trace.path[-1].error


def test_two_ranks_take_the_same_first_step_as_one(tmp_path: Path) -> None:
    words = ("pipeline", QUICKSTART, *SMALL, f"runs_dir={tmp_path}")
    for name, launcher in (("one", command()), ("two", TWO_RANKS)):
        done = subprocess.run([*launcher, *words, f"name={name}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for phase in ("warm_start", "train"):
        one, two = (metrics(tmp_path / name, phase)[0] for name in ("one", "two"))
        assert one.keys() == two.keys()
        for key in ("loss", "grad_norm", "entropy", "tokens"):
            assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1e-9), (phase, key)
    one, two = (list(trace_store.read(tmp_path / name / "traces" / "train.jsonl")) for name in ("one", "two"))
    assert [[t.completion_ids for t in trace.turns] for trace in one[:4]] == [
        [t.completion_ids for t in trace.turns] for trace in two[:4]
    ]
    assert (tmp_path / "two" / "report.html").is_file()


def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    words = ("train", QUICKSTART, *SMALL, "method.tasks_per_step=3", f"runs_dir={tmp_path}")
    done = subprocess.run([*TWO_RANKS, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "method.tasks_per_step=3: 2 ranks do not divide it; nearest valid values are 2 and 4" in done.stderr


def test_ctrl_c_is_one_line_and_leaves_whole_traces(tmp_path: Path) -> None:
    words = ("pipeline", QUICKSTART, *SMALL, "method.steps=100000", f"runs_dir={tmp_path}")
    with subprocess.Popen(
        command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:  # fmt: skip
        file = tmp_path / "quickstart" / "traces" / "train.jsonl"
        deadline = time.monotonic() + 120
        while not (file.exists() and file.stat().st_size > 20_000):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in out and "Traceback" not in err
    assert len(list(trace_store.read(file))) >= 4


def test_a_full_disk_is_one_message_and_earlier_lines_stay(tmp_path: Path) -> None:
    # /dev/full fails every write as a full disk does.
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full (Linux)")
    traces = tmp_path / "quickstart" / "traces"
    words = ("rollout", QUICKSTART, *SMALL, f"runs_dir={tmp_path}", "rollout.num_tasks=2")
    code = (
        "import sys; from pathlib import Path; from mas_hpc import run; build = run.build\n"
        "def with_full_disk(*a, **named):\n"
        f"    built = build(*a, **named); traces = Path({str(traces)!r}); traces.mkdir()\n"
        "    (traces / 'rollout.jsonl').symlink_to('/dev/full')\n"
        "    return built\n"
        "run.build = with_full_disk\n"
        f"from mas_hpc.cli import main; sys.argv = ['mas-hpc', *{list(words)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 74 and "No space left" in done.stderr and "Traceback" not in done.stderr
