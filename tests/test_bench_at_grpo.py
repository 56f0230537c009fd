"""The order of the jobs of bench_at_grpo, its equal tokens and its paired intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_hpc.config_file import load_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import each other as scripts do

from at_grpo_jobs import SYSTEMS, TASKS, Bench, Job, corrected_steps, equal_steps, is_equal, run_to_end, waves  # noqa: E402
from at_grpo_rows import Measured, collected, commits, compared, interval, name_of, table, totals  # noqa: E402
from bench_at_grpo import Progress  # noqa: E402


def measured(seed: int, system: str, accuracy: float, task: str = "ring") -> Measured:
    return Measured(task=task, seed=seed, system=system, temperature=1.0, accuracy=accuracy, tokens=20.0, training_tokens=1e3)


def write_training(folder: Path, system: str, tokens: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{system}-{len(tokens)}"
    record = {"name": name, "cpu_s": 10.0, "commit": "c0ffee"}
    (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / f"{system}.json").write_text(json.dumps({**record, "tokens": tokens}))
    (folder / name).mkdir()
    lines = [{"phase": "train/held_out", "accuracy": 0.1}, *({"phase": "train", "tokens/sampled": value} for value in tokens)]
    (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_what_matters_is_first_and_no_job_is_queued_twice() -> None:
    first, second, rest = waves(list(TASKS), [1, 2, 3, 4], list(SYSTEMS))
    assert [(jobs[0].task, jobs[0].seed) for jobs in first] == [("ring", 1), ("ring", 2), ("ring", 3)]
    assert [(jobs[0].task, jobs[0].seed) for jobs in second] == [
        ("shortest_path", 1), ("mini_sudoku", 1), ("shortest_path", 2), ("mini_sudoku", 2),
    ]  # fmt: skip
    assert {job.system for job in first[0]} == {"", *SYSTEMS}
    assert {job.system for job in second[0]} == {"", "at_grpo", "untrained", "per_agent", "agent_grpo", "single_grpo"}
    every = [job for wave in (first, second, rest) for jobs in wave for job in jobs]
    assert (
        len(every) == len(set(every)) == 4 * (3 * 22 + 2)
    )  # a warm start, 10 trainings, 11 evaluations; the PRM's two on the ring


def test_the_budget_is_trained_right_after_the_warm_start_even_if_not_asked_for() -> None:
    jobs = waves(["ring"], [7], ["loo", "untrained"])[0][0]
    assert [f"{job.stage} {job.system}".strip() for job in jobs] == [
        "warm", "train at_grpo", "evaluate at_grpo", "train loo", "evaluate loo", "evaluate untrained",
    ]  # fmt: skip


def test_a_prm_is_only_asked_for_where_steps_are_judged() -> None:
    every = [job for wave in waves(list(TASKS), [1], list(SYSTEMS)) for jobs in wave for job in jobs]
    assert {job.task for job in every if job.system == "process_reward"} == {"ring"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.overrides is not None])
def test_systems_share_the_settings_of_at_grpo(task: str, name: str) -> None:
    file = ROOT / "configs" / TASKS[task]
    ours, theirs = load_config(file).method, load_config(file, SYSTEMS[name].overrides).method
    assert (theirs.tasks_per_step, theirs.group_size) == (ours.tasks_per_step, ours.group_size)
    assert theirs.learning_rate == (2e-3 if name == "per_agent" else ours.learning_rate)
    assert (theirs.loss, theirs.advantage, theirs.warmup_steps) == (ours.loss, ours.advantage, ours.warmup_steps)


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_equal_steps_are_the_fewest_that_sample_the_budget(budget: int, tokens_per_step: int) -> None:
    steps = equal_steps(budget, tokens_per_step)
    assert steps * tokens_per_step >= budget and ((steps - 1) * tokens_per_step < budget or steps == 1)


def test_a_run_is_equal_within_two_percent_more_five_less_or_one_step() -> None:
    assert is_equal(1019, 1000, 10) and not is_equal(1021, 1000, 10)
    assert is_equal(951, 1000, 10) and not is_equal(949, 1000, 10)
    assert is_equal(1099, 1000, 100) and not is_equal(1101, 1000, 100)
    assert is_equal(901, 1000, 100) and not is_equal(899, 1000, 100)


def test_tokens_of_a_step_are_expected_from_earlier_seeds_in_proportion(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, steps=2)
    for seed, ours, theirs in ((1, [100.0, 60.0], [240.0]), (2, [100.0, 100.0], [100.0])):
        write_training(bench.trained("ring", seed), "at_grpo", ours)
        write_training(bench.trained("ring", seed), "loo", theirs)
    write_training(bench.trained("ring", 3), "at_grpo", [50.0, 30.0])
    job = Job(task="ring", seed=3, stage="train", system="loo")
    assert bench.expected_tokens_per_step(job) == pytest.approx(40 * (3 + 1) / 2)


def test_the_first_seed_expects_its_trial_to_decline_as_at_grpo_did_but_not_a_single_agents(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, steps=4)
    write_training(bench.trained("ring", 1), "at_grpo", [100.0, 100.0, 50.0, 50.0])
    for system in ("loo", "single_grpo"):
        write_training(bench.base("ring", 1), system, [200.0, 220.0])
    loo, single = (Job(task="ring", seed=1, stage="train", system=name) for name in ("loo", "single_grpo"))
    assert bench.expected_tokens_per_step(loo) == pytest.approx(210 * 75 / 100)
    assert bench.expected_tokens_per_step(single) == pytest.approx(210)


def test_a_training_that_missed_the_budget_is_repeated_with_the_steps_that_it_needed(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, steps=2)
    folder = bench.trained("ring", 1)
    write_training(folder, "at_grpo", [500.0, 500.0])
    write_training(bench.base("ring", 1), "loo", [200.0, 200.0])
    write_training(folder, "loo", [100.0] * 5)  # 200 were expected
    write_training(folder, "loo", [100.0] * 10)
    (folder / "loo.json").unlink()
    assert bench.train(Job(task="ring", seed=1, stage="train", system="loo"))["name"] == "loo-10"


def test_steps_are_corrected_in_proportion_until_the_budget_lies_between_two_runs() -> None:
    assert corrected_steps({40: 2000.0}, 1000) == 20
    assert corrected_steps({40: 2000.0, 20: 600.0}, 1000) == 26  # 20 + 400 / 1400 * 20 = 25.7
    assert corrected_steps({20: 600.0, 21: 1400.0}, 1000) == 21


def test_of_trainings_that_all_miss_the_budget_the_closest_counts(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, steps=2)
    folder = bench.trained("ring", 1)
    write_training(folder, "at_grpo", [500.0, 500.0])
    write_training(bench.base("ring", 1), "loo", [120.0, 120.0])  # 9 steps
    write_training(folder, "loo", [200.0] * 9)  # 1800; 5 in proportion
    write_training(folder, "loo", [160.0] * 5)  # 800; 5 + 200 / 1000 * 4, so 6
    write_training(folder, "loo", [300.0] * 6)  # 1800; 6 again
    (folder / "loo.json").unlink()
    assert bench.train(Job(task="ring", seed=1, stage="train", system="loo"))["name"] == "loo-5"


def test_finished_commands_are_not_run_again(tmp_path: Path) -> None:
    bench, job = Bench(folder=tmp_path, steps=2), Job(task="ring", seed=1, stage="train", system="at_grpo")
    write_training(bench.trained("ring", 1), "at_grpo", [500.0, 500.0])
    bench.record(job).unlink()
    bench.perform(job)
    assert bench.found("ring", 1, "at_grpo")["tokens"] == [500.0, 500.0]


def test_a_child_that_fails_stops_the_benchmark_and_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"status 3.*child\.log"):
        run_to_end([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "child.log")
    assert (tmp_path / "child.log").read_text() == "why\n"


def test_differences_are_paired_by_seed() -> None:
    # .1 and .2: mean .15, standard error .05, t(.975, 1) = 12.706
    ours = [measured(1, "AT-GRPO", 0.5), measured(2, "AT-GRPO", 0.7), measured(3, "AT-GRPO", 0.9)]
    (row,) = compared([*ours, measured(2, "loo", 0.5), measured(1, "loo", 0.4), measured(4, "loo", 0.0)])
    assert (row.case, row.seeds) == ("ring, T=1, n=2", (1, 2))
    assert (row.ours, row.theirs, row.difference) == pytest.approx((0.6, 0.45, 0.15))
    assert row.half_width == pytest.approx(0.6353, abs=1e-4)
    assert row.winner == "undecided" and row.holds
    assert interval(row) == "+15.0 [-48.5, +78.5]"


@pytest.mark.parametrize(
    ("gains", "wins"), [([0.10, 0.11, 0.12], "AT-GRPO"), ([-0.10, -0.11, -0.12], "loo"), ([0.3], "undecided")]
)
def test_a_winner_needs_an_interval_on_one_side_of_zero(gains: list[float], wins: str) -> None:
    ours = [measured(seed, "AT-GRPO", 0.5 + gain) for seed, gain in enumerate(gains)]
    (row,) = compared([*ours, *(measured(seed, "loo", 0.5) for seed in range(len(gains)))])
    assert row.winner == wins
    assert interval(row).endswith("(one seed)") == (len(gains) == 1)
    assert row.holds == (gains[0] > 0)


def test_tasks_and_temperatures_are_not_mixed() -> None:
    rows = compared([measured(1, "AT-GRPO", 0.5), measured(1, "loo", 0.4), measured(1, "loo", 0.9, task="mini_sudoku")])
    assert [(row.task, row.theirs) for row in rows] == [("ring", 0.4)]
    assert table("ring", rows).row_count == 1 and table("mini_sudoku", rows).row_count == 0


def test_rows_of_an_evaluation_are_named_by_system_and_control() -> None:
    assert name_of("majority vote of 4", SYSTEMS["untrained"]) == "untrained team, majority vote of n"
    assert name_of("best of 12 by own critic", SYSTEMS["at_grpo"]) == "AT-GRPO, best of n by own critic"
    assert name_of("solver over 4 turns", SYSTEMS["untrained"]) == "untrained team, solver over n turns"
    assert name_of("team", SYSTEMS["loo"]) == "AT-GRPO, credit loo"
    assert name_of("solver alone", SYSTEMS["loo"]) == ""
    assert name_of("solver alone", SYSTEMS["single_grpo"]) == "single-agent GRPO"
    assert name_of("team", SYSTEMS["single_grpo"]) == "single-agent GRPO, run as a team"


def test_only_finished_evaluations_are_reported(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, steps=2)
    folder = bench.trained("ring", 1)
    write_training(folder, "at_grpo", [300.0, 200.0])
    rows = [{"name": "team", "temperature": 0.0, "accuracy": 0.5, "tokens_per_question": 21.0}]
    for run in ("at_grpo-evaluated", "loo-evaluated"):
        (folder / run).mkdir()
        (folder / run / "results.json").write_text(json.dumps({"rows": rows}))
    (folder / "at_grpo-evaluated.json").write_text("{}")
    chosen = (["ring", "mini_sudoku"], [1, 2], ["loo"])
    (found,) = collected(bench, *chosen)
    assert (found.system, found.accuracy, found.tokens, found.training_tokens) == ("AT-GRPO", 0.5, 21.0, 500.0)
    assert totals(bench, *chosen) == {"sampled to train, ring": "AT-GRPO: 500 tokens in 2 steps, 10 CPU s"}


def test_commits_say_which_of_them_were_changed(tmp_path: Path) -> None:
    (tmp_path / "ring-1").mkdir()
    for name, commit in (("warm", "a" * 40), ("prm", "a" * 40 + "+changes"), ("loo-2", "a" * 40), ("other", "")):
        (tmp_path / "ring-1" / f"{name}.json").write_text(json.dumps({"commit": commit}))
    assert commits(Bench(folder=tmp_path, steps=2)) == "aaaaaaa, aaaaaaa+changes"


def test_time_left_is_that_of_the_jobs_that_are_not_finished() -> None:
    train, evaluate = (Job(task="ring", seed=1, stage=stage, system="loo") for stage in ("train", "evaluate"))
    progress = Progress([train, evaluate, train, evaluate], processes=2)
    progress.finish(train, 120.0)
    assert progress.minutes_left() == pytest.approx(3 * 2 / 2)  # nothing is known of evaluations yet
    progress.finish(evaluate, 60.0)
    assert progress.minutes_left() == pytest.approx((2 + 1) / 2)
