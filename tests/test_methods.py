"""Every training method through the command line: each learns on held-out data, each knob runs, each mistake is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from random import Random

import pytest

from mas_hpc.cli import app, main

ROOT = Path(__file__).parents[1]
RING = ("seed=1", "warm_start.steps=0", "data.num_digits=5", "data.num_train=300", "data.num_test=200")
SLIPPING_SOLVER = (
    *RING, "team.topology=single", "method.steps=130", "method.learning_rate=2e-3", "method.wrong_rate=0.0",
    "method.slip_rate=0.7",
)  # fmt: skip
TINY = (
    "model.hidden_size=32", "model.num_heads=2", "warm_start.steps=0", "data.num_train=40", "data.num_test=10",
    "data.num_digits=5", "method.steps=2",
)  # fmt: skip
FEW_OFFLINE = ("method.batch_size=4",)
FEW_ONLINE = ("method.tasks_per_step=8", "method.eval_every=0")

Words = tuple[str, ...]
Cli = Callable[..., tuple[int, str, str]]
Look = Mapping[str, float]


def config(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.yaml")


def train(method: str, runs: Path, *words: str) -> Path:
    """Train configs/<method>.yaml with overrides and return the run's folder."""
    name = f"{method}-{len(list(runs.iterdir()))}"
    app(["train", config(method), *words, f"runs_dir={runs}", f"name={name}"], standalone_mode=False)
    return runs / name


def lines(folder: Path, phase: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["phase"] == phase]


def before_after(folder: Path) -> tuple[Look, Look]:
    """Held-out metrics before the first step and after the last."""
    looks = lines(folder, "train/held_out")
    return looks[0], looks[-1]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: Path) -> Cli:
    """Run `mas-hpc <command> configs/<method>.yaml ...` and return its exit code, output and errors."""

    def call(command: str, method: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mas-hpc", command, config(method), *words, f"runs_dir={runs / 'mistakes'}"])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def solver_run(runs: Path) -> Path:
    return train("sft", runs, *SLIPPING_SOLVER)


@pytest.fixture(scope="session")
def base(solver_run: Path) -> str:
    """The override that starts from a solver of ring puzzles who slips on purpose."""
    return f"model.path={solver_run / 'model'}"


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def digits(rng: Random, length: int, alphabet: str = "0123456789") -> str:
    return "".join(rng.choices(alphabet, k=length))


@pytest.fixture(scope="session")
def pairs(runs: Path) -> Path:
    """A preference that can be learnt from one look at the answer: small digits above large ones."""
    rng = Random(0)
    rows: list[dict[str, object]] = [
        {"prompt": f"Q{digits(rng, 4)}", "chosen": digits(rng, 3, "01234"), "rejected": digits(rng, 3, "56789")}
        for _ in range(500)
    ]
    return write_rows(runs / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def judged(runs: Path) -> Path:
    """Solutions of single digits: a step is right when it is small."""
    rng = Random(0)
    rows: list[dict[str, object]] = []
    for _ in range(500):
        steps = list(digits(rng, 4, "012345678"))
        rows.append({"prompt": f"Q{digits(rng, 4)}", "completions": steps, "labels": [step < "7" for step in steps]})
    return write_rows(runs / "judged.jsonl", rows)


# ---- every method learns


def test_sft_lowers_the_held_out_loss(solver_run: Path) -> None:
    before, after = before_after(solver_run)
    assert after["loss"] < 0.25 * before["loss"]


@pytest.mark.parametrize("objective", ["bradley_terry", "outcome"])
def test_a_reward_model_learns_a_preference(runs: Path, pairs: Path, objective: str) -> None:
    words = ("seed=1", f"data.path={pairs}", "data.num_train=300", "data.num_test=200", "model.hidden_size=64")
    folder = train("rm", runs, *words, f"method.objective={objective}", "method.steps=40")
    before, after = before_after(folder)
    assert after["accuracy"] > 0.95 > 0.75 > before["accuracy"]
    assert after["loss"] < 0.5 * before["loss"]


def test_a_process_reward_model_finds_first_errors(runs: Path, judged: Path) -> None:
    words = (
        "seed=1",
        f"data.path={judged}",
        "data.num_train=300",
        "data.num_test=200",
        "data.separator=+",
        "model.hidden_size=64",
    )
    before, after = before_after(train("prm", runs, *words, "method.steps=60"))
    assert after["f1"] > 0.9 > 0.3 > before["f1"], "a constant prediction has f1 0"
    assert after["accuracy"] > 0.95


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_preferences_raise_the_margin_of_right_answers(runs: Path, base: str, loss: str) -> None:
    before, after = before_after(train("dpo", runs, *RING, base, f"method.losses={{{loss}: 1.0}}", "method.steps=20"))
    margins = [look["rewards/chosen"] - look["rewards/rejected"] for look in (before, after)]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[1] > 0.1
    assert after["loss"] < before["loss"] - 0.02
    if loss == "sigmoid":
        assert after["rewards/accuracies"] > 0.9


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ppo", ("method.critic=separate", "method.tasks_per_step=64")),
        ("ppo", ("method.critic=shared", "method.critic_warmup_steps=0", "method.tasks_per_step=64")),
        ("grpo", ()),
    ],
)  # fmt: skip
def test_rewards_raise_held_out_accuracy(runs: Path, base: str, method: str, words: Words) -> None:
    few = ("method.steps=20", "method.eval_every=20", "method.learning_rate=6e-4", "evaluation.num_tasks=200")
    folder = train(method, runs, *RING, base, *few, *words)
    before, after = before_after(folder)
    assert after["accuracy"] > before["accuracy"] + 0.12  # 3 standard errors of the difference, the ceiling is +0.25
    if method == "ppo":
        errors = [line["value/error"] for line in lines(folder, "train")]
        assert errors[-1] < 0.7 * errors[0], "the critic learns"


# ---- every knob runs


def two_steps(method: str, runs: Path, *words: str) -> list[Look]:
    """Metrics of two steps on little data: every loss is a number, and something was learnt from."""
    few = FEW_ONLINE if method in ("grpo", "ppo") else FEW_OFFLINE
    group = ("method.group_size=4",) if method == "grpo" else ()
    found = lines(train(method, runs, *TINY, *few, *group, *words), "train")
    assert len(found) == 2 and all(isfinite(line["loss"]) for line in found)
    assert max(line["grad_norm"] for line in found) > 0
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("method.losses={hinge: 1.0}",),
        ("method.losses={ipo_sum: 1.0}",),
        ("method.losses={ipo_mean: 1.0}",),
        ("method.losses={robust: 1.0}", "method.label_smoothing=0.1"),
        ("method.losses={simpo: 1.0}", "method.beta=2.0"),
        ("method.losses={orpo: 0.2, sft: 1.0}",),
        ("method.losses={sigmoid: 1.0, sft: 0.5, hinge: 0.1}",),
        ("method.reference_free=true",),
        ("method.losses={kto: 1.0}", "method.undesirable_weight=1.5"),
        ("adapters.policies=per_agent", "adapters.rank=2"),
    ],
)
def test_relatives_of_dpo_run(runs: Path, words: Words) -> None:
    two_steps("dpo", runs, *words)


@pytest.mark.parametrize("advantage", ["group", "group_mean", "group_batch", "rloo", "reinforce_pp", "rae"])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_relatives_of_grpo_run(runs: Path, base: str, loss: str, advantage: str) -> None:
    if (loss, advantage) != ("gspo", "reinforce_pp"):
        two_steps("grpo", runs, base, f"method.loss={loss}", f"method.advantage={advantage}")


TEAM = "team={topology: pipeline, agents: [{name: solver, role: solver}, {name: critic, role: critic}]}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((TEAM, "method.group_by=agent"), "reward/critic"),
        ((TEAM, "method.group_by=task"), "reward/critic"),
        (("method.dynamic_sampling=2",), "frac_reward_zero_std"),
        (("method.kl.coefficient=0.05",), "kl"),
        (("method.kl={coefficient: 0.05, estimator: k1}",), "kl"),
        (("method.kl={coefficient: 0.05, place: reward, target: 0.1}", "method.advantage=reinforce_pp"), "kl/sequence"),
        (("method.minibatches=2", "method.updates_per_batch=2", "method.dual_clip=3.0"), "clip_ratio/"),
        (("method.mismatch=token_truncate",), "sampling/"),
        (("method.mismatch=token_mask", "method.updates_per_batch=2"), "sampling/"),
        (("method.mismatch=sequence_truncate",), "sampling/"),
        (("method.mismatch=sequence_mask",), "sampling/"),
        (("adapters.policies=per_agent", "adapters.rank=2", TEAM), "reward/critic"),
        (("method.optimizer=adafactor", "method.decay=cosine"), "learning_rate"),
        (("model.activation_checkpointing=true",), "loss"),
        (("method.alpha=0.5", "method.break_penalty=0.5", TEAM), "reward/solver"),
    ],
)
def test_knobs_of_grpo_run(runs: Path, base: str, words: Words, expected: str) -> None:
    found = two_steps("grpo", runs, base, *words)
    assert any(name.startswith(expected) for name in found[-1]), sorted(found[-1])


@pytest.mark.parametrize(
    "words",
    [
        ("method.critic=shared", "adapters.policies=per_agent", "adapters.rank=2"),
        ("method.kl={coefficient: 0.05, place: reward, target: 0.1, estimator: k1}",),
        ("method.critic_warmup_steps=0", "method.value_clip=0.0", "method.whiten_advantages=false"),
        (TEAM, "method.mismatch=token_truncate", "method.updates_per_batch=2"),
        ("model.activation_checkpointing=true", "method.critic=shared"),
    ],
)
def test_knobs_of_ppo_run(runs: Path, base: str, words: Words) -> None:
    assert "value/error" in two_steps("ppo", runs, base, "method.critic_warmup_steps=0", *words)[-1]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sft", ("method.neftune_alpha=5.0",)),
        ("sft", ("method.optimizer=adafactor", "method.decay=cosine", "method.decay_fraction=1.0")),
        ("sft", ("adapters.policies=per_agent", "adapters.rank=2")),
        ("sft", ("model.activation_checkpointing=true",)),
        ("rm", ("method.objective=outcome",)),
        ("rm", ("method.center_coefficient=0.0", "model.activation_checkpointing=true")),
        ("prm", ("method.optimizer=adafactor",)),
    ],
)
def test_knobs_of_offline_methods_run(runs: Path, method: str, words: Words) -> None:
    two_steps(method, runs, *words)


def test_the_best_of_the_looks_is_what_is_kept(runs: Path) -> None:
    # The rate is so high that the loss rises: the best look is the first.
    words = (*TINY, *FEW_OFFLINE, "method.steps=4", "method.eval_every=1", "method.learning_rate=1e2", "method.warmup_steps=0")
    folder = train("sft", runs, *words)
    losses = [look["loss"] for look in lines(folder, "train/held_out")]
    assert len(losses) == 5 and min(losses) == losses[0]
    again = train("sft", runs, *words, f"model.path={folder / 'model'}", "method.steps=1")
    assert lines(again, "train/held_out")[0]["loss"] == pytest.approx(losses[0], rel=1e-6)


# ---- a trained reward model is a reward


@pytest.fixture(scope="session")
def reward_models(runs: Path) -> dict[str, Path]:
    small = (*TINY, *FEW_OFFLINE)
    return {
        "rm": train("rm", runs, *small) / "model",
        "prm": train("prm", runs, *small) / "model",
        "adapted": train("rm", runs, *small, "adapters.policies=per_agent", "adapters.rank=2") / "model",
    }


@pytest.mark.parametrize(
    ("method", "judge"), [("grpo", "rm"), ("grpo", "adapted"), ("grpo", "prm"), ("ppo", "prm"), ("ppo", "rm")]
)
def test_a_trained_reward_model_is_the_reward(runs: Path, reward_models: Mapping[str, Path], method: str, judge: str) -> None:
    warm = ("method.critic_warmup_steps=0",) if method == "ppo" else ()
    found = two_steps(method, runs, *warm, f"method.reward_model={reward_models[judge]}")
    assert all(line["reward"] not in (0.0, 1.0) and line["reward_std"] > 0 for line in found)
    assert judge != "prm" or all(0 < line["reward"] < 1 for line in found)


def test_a_folder_that_is_no_reward_model_is_refused(cli: Cli, runs: Path, solver_run: Path) -> None:
    for folder in (solver_run / "model", runs / "nowhere"):
        code, _, err = cli("train", "grpo", *TINY, *FEW_ONLINE, f"method.reward_model={folder}")
        assert code == 1 and "no reward_model.json there" in err and len(err.splitlines()) == 1


# ---- mistakes


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("grpo", ("method.group_size=1",), "group_size=1: advantage=group compares members of a group; set it to 2 or more"),
        ("grpo", ("method.kl={coefficient: 0.1, estimator: k1, unbiased: false}",), "set kl.unbiased=true"),
        ("grpo", ("method.kl={coefficient: 0.1, place: reward}",), "set kl.place=loss"),
        ("grpo", ("method.kl={target: 0.1}",), "needs a kl.coefficient above 0"),
        ("grpo", ("method.loss=gspo", "method.dual_clip=3.0"), "set dual_clip=0"),
        ("grpo", ("method.loss=gspo", "method.advantage=reinforce_pp"), "set loss=dapo"),
        ("grpo", ("data={kind: preferences, path: pairs.jsonl}",), "set data.kind to a task set"),
        ("grpo", ("data.num_train=3",), "set it to at most 3"),
        ("grpo", ("method.truncated=mask",), "set truncated=keep"),
        ("dpo", ("method.losses={kto: 1.0, sigmoid: 1.0}",), "kto alone"),
        ("dpo", ("method.losses={kto: 1.0}", "method.reference_free=true"), "set it to false"),
        ("dpo", ("method.losses={kto: 1.0}", "method.batch_size=1"), "kto estimates its KL from other prompts"),
        ("dpo", ("method.losses={sigmoid: .nan}",), "expected finite weights of 0 or more"),
        ("dpo", ("method.losses={sigmoid: -1.0, sft: 2.0}",), "expected finite weights of 0 or more"),
        ("grpo", ("method.dual_clip=0.5",), "set it above 1 (3 is usual), or 0 for none"),
        ("grpo", ("method.group_size=1", "method.advantage=rae", "method.dynamic_sampling=2"), "set group_size to 2 or more"),
        (
            "grpo",
            ("team.topology=pipeline", "method.kl={coefficient: 0.1, target: 1.0, horizon: 50.0}"),
            "a step has 256 sequences, which could turn the coefficient negative; set it above 51.2",
        ),
        ("grpo", ("team.agents=[{name: critic, role: critic}]",), "expected an agent whose role gives an answer"),
        ("dpo", ("data={kind: steps, path: steps.jsonl}",), "set data.kind to preferences"),
        ("rm", ("data={kind: documents, path: texts.jsonl}",), "set data.kind to preferences"),
        ("prm", ("data={kind: addition}",), "set data.kind=steps, or ring"),
        ("ppo", ("adapters.policies=per_agent",), "set method.critic=shared"),
        ("ppo", ("method.critic=shared",), "set critic_warmup_steps=0, or critic=separate"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy(cli: Cli, method: str, words: Words, message: str) -> None:
    few = FEW_ONLINE if method in ("grpo", "ppo") else FEW_OFFLINE
    code, _, err = cli("train", method, *TINY, *few, *words)
    assert code == 1 and message in err
    assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_limit_that_leaves_no_record_is_refused(cli: Cli, runs: Path, split: str) -> None:
    folder = runs / f"long-{split}"
    folder.mkdir()
    for name in ("train", "test"):
        prompt = "Q" + "1" * (30 if name == split else 3)
        write_rows(folder / f"{name}.jsonl", [{"prompt": prompt, "chosen": "12", "rejected": "34"}])
    words = (f"data.path={folder}", "data.max_length=20", "warm_start=null", "method.steps=1")
    code, out, err = cli("train", "dpo", *words)
    assert code == 1 and f"of data.num_{split} no record is left" in err
    assert "1 of 1 records have more than data.max_length=20 tokens" in out
