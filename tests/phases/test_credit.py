"""mas-hpc credit on a scripted team whose faults are known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from math import nan
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mas_hpc.credit_assignment.credit import Credit
from mas_hpc.credit_assignment.credit import Path as CreditPath
from mas_hpc.credit_assignment.error_localization import Fault
from mas_hpc.credit_assignment.message_rewards import FailureRewards
from mas_hpc.data import trace_store
from mas_hpc.data.preferences import Pair, load_preferences
from mas_hpc.data.steps import load_steps
from mas_hpc.data.tasks import load_tasks
from mas_hpc.evaluation.report.build import build_report
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.phases.credit import CreditOptions, credit
from mas_hpc.phases.credit import record as as_record
from mas_hpc.phases.credit_data import step_row
from mas_hpc.phases.credit_results import print_credit
from mas_hpc.phases.replays import Game
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollouts import how_to_play
from tests.phases.conftest import NUM_TASKS, ROOT, opened
from tests.phases.scripted_team import CORRUPTED, HONEST, VARYING, Scripted, always, lines_of, often, record, spoken_for


@pytest.mark.parametrize("value", ["removal", "masked"])
def test_a_solver_whose_answer_is_repeated_earns_everything(folder: Path, value) -> None:
    record(folder, HONEST)
    run, engine = spoken_for(opened(folder), {**HONEST, "reviser": lambda request: "wrong" if alone(request) else "repeats"})

    def alone(request: Request) -> bool:
        return "S" not in run.tokenizer.decode(request.prompt_ids)

    results = credit(run, CreditOptions(method="shapley", value=value, replays=2))
    found = {agent: (entry["phi"]["mean"], entry["message"]["mean"]) for agent, entry in results["agents"].items()}
    assert found == {"solver": (1.0, 1.0), "critic": (0.0, 0.0), "reviser": (0.0, 0.0), "verifier": (0.0, 0.0)}
    assert results["agents"]["solver"]["phi"]["standard_error"] == 0.0
    calls = {"removal": 7, "masked": 4}[value]  # masked keeps the record's S, SC and SCR: CR, C, R and SR are new
    assert len(engine.requests) == results["requests"]["sampled"] == NUM_TASKS * 2 * calls
    assert results["accuracy"] == 1.0 and results["traces"] == {"file": "rollout", "credited": NUM_TASKS, "missing": 0}
    for trace in trace_store.read(folder / "traces" / f"credit-shapley-{value}.jsonl"):
        assert [turn.credit for turn in trace.path] == [1.0, 0.0, 0.0, 0.0]
        assert trace.label == f"credit shapley-{value}"
    assert json.loads((folder / "credit" / f"shapley-{value}" / "summary.json").read_text()) == results
    rows = lines_of(folder, f"shapley-{value}", "traces")
    assert [row["number"] for row in rows] == list(range(NUM_TASKS))
    assert {(*row["rewards"], *row["phi"].values(), row["total"]) for row in rows} == {(1.0, 0.0, 0.0, 0.0) * 2 + (1.0,)}
    assert all(row["standard_error"] == [0.0] * 4 for row in rows), "both replays say the same"
    assert all(row.keys().isdisjoint({"pairs", "positives", "steps", "unvalued"}) for row in rows)


def test_a_corrupted_message_is_found_and_every_alternative_that_repairs_it_is_preferred(folder: Path) -> None:
    traces = record(folder, CORRUPTED)
    assert {trace.reward for trace in traces} == {0.0}
    run, _ = spoken_for(opened(folder), HONEST)
    results = credit(run, CreditOptions(method="reward_blame", replays=4, resamples=2))
    assert {agent: entry["first_errors"] for agent, entry in results["agents"].items()} == {
        "solver": NUM_TASKS, "critic": 0, "reviser": 0, "verifier": 0,
    }  # fmt: skip
    for trace in trace_store.read(folder / "traces" / "credit-reward_blame-removal.jsonl"):
        assert [turn.credit for turn in trace.path] == [-1.0, 0.0, 0.0, 0.0]
    assert results["rows"] == {"pairs": 2 * NUM_TASKS, "positives": 0, "steps": NUM_TASKS, "faults": NUM_TASKS, "unvalued": 0}
    pairs, _ = load_preferences(
        str(folder / "credit" / "reward_blame-removal" / "pairs.jsonl"), num_train=2 * NUM_TASKS, num_test=0, seed=0
    )
    recorded = {f"Q{trace.task.compact}S": trace for trace in traces}
    for pair in pairs:
        assert isinstance(pair, Pair) and isinstance(pair.prompt, str)
        trace = recorded[pair.prompt]
        assert (pair.chosen, pair.rejected, pair.margin) == (trace.task.answer, trace.path[0].text, 1.0)
    steps, _ = load_steps(
        str(folder / "credit" / "reward_blame-removal" / "steps.jsonl"), num_train=NUM_TASKS, num_test=0, seed=0
    )
    for solution in steps:
        assert solution.steps == tuple(turn.text for turn in recorded[solution.prompt].path)
        assert solution.labels == (0.0, 0.0, 0.0, 0.0), "nobody repairs what the solver wrote"
    rows = lines_of(folder, "reward_blame-removal", "steps")
    assert {tuple(row["hard_labels"]) for row in rows} == {(0.0, None, None, None)}
    named = [(row["turn"], row["agent"]) for row in lines_of(folder, "reward_blame-removal", "faults")]
    assert named == [(0, "solver")] * NUM_TASKS


def test_the_record_of_a_fault_names_the_turns_that_tried_to_repair_it(folder: Path) -> None:
    [trace, *_], run = record(folder, CORRUPTED), opened(folder)
    how = how_to_play(run, Sampling(temperature=1.0), 0)
    path = CreditPath(turns=trace.path, players=tuple(run.team.agents), outcome=0.0)
    game = Game(task=trace.task, path=path, how=how, value="removal", num_replays=4)
    fault = Fault(agent="solver", turn=0, step=None, method="value", evidence="")
    found = Credit(rewards=(-1.0, nan, 0.0, 0.0), values=(0.75, 0.0, 0.5, 0.0, 0.0), fault=fault)
    row = as_record(game, found, {"pairs": []})
    assert (row["fault"]["turn"], row["fault"]["repairs"]) == (0, [1]), "the critic's message raised the value again"
    assert (row["rewards"], row["pairs"], row["phi"], row["total"]) == ([-1.0, None, 0.0, 0.0], [], {}, None)


@pytest.mark.parametrize(
    ("outcome", "values", "failure", "hard"),
    [
        (1.0, (0.5, 0.5, 1.0, 1.0, 1.0), None, [1.0, 1.0, 1.0, 1.0]),
        (1.0, (0.5, 0.5, 0.0, 1.0, 1.0), None, [1.0, 0.0, None, None]),
        (0.0, (1.0, 1.0, 0.0, 0.5, 0.0), 1, [1.0, 0.0, None, None]),
        (0.0, (1.0, 1.0, 0.0, 0.5, 0.0), 2, [1.0, 1.0, 0.0, None]),  # a localizer's word
        (0.0, (0.0, 0.0, 0.0, 0.0, 0.0), None, [None, None, None, None]),
    ],
)
def test_steps_have_soft_labels_by_value_and_hard_ones_where_they_are_known(
    folder: Path, outcome: float, values: tuple[float, ...], failure: int | None, hard: list[float | None]
) -> None:
    [trace, *_], run = record(folder, CORRUPTED), opened(folder)
    path = CreditPath(turns=trace.path, players=tuple(run.team.agents), outcome=outcome)
    how = how_to_play(run, Sampling(temperature=1.0), 0)
    game = Game(task=trace.task, path=path, how=how, value="removal", num_replays=4)
    blamed = FailureRewards(rewards=(0.0,) * 4, first_error=failure, repairs=(), harmful=(), residual=0.0)
    row = step_row(game, Credit(rewards=(0.0,) * 4, values=values, failure=None if outcome else blamed))
    assert row is not None and (row["labels"], row["hard_labels"]) == (list(values[1:]), hard)


def test_all_messages_get_alternatives_when_asked_and_the_best_are_positives(folder: Path) -> None:
    record(folder, {"solver": often, "reviser": lambda request: "repeats"})
    run, _ = spoken_for(opened(folder), {"solver": often, "reviser": lambda request: "repeats"})
    results = credit(run, CreditOptions(method="local", replays=1, resamples=3, pairs="all"))
    pairs, positives = (lines_of(folder, "local", name) for name in ("pairs", "positives"))
    assert len(pairs) == results["rows"]["pairs"] > 0 and {row["agent"] for row in pairs} == {"solver"}
    answers = {task.compact: task.answer for task in load_tasks(run.config.data)[1]}
    for row in pairs:
        assert row["chosen"] == answers[row["prompt"][1:4]] != row["rejected"] and row["margin"] == 1.0
    assert {row["agent"] for row in positives} == set(run.team.agents), "whatever is said after a right answer succeeds"
    for row in positives:
        assert row["agent"] in ("critic", "verifier") or row["completion"] == answers[row["prompt"][1:4]]


def test_alternatives_are_sampled_again_but_not_what_follows_them(folder: Path) -> None:
    record(folder, VARYING)
    options = CreditOptions(method="local", replays=2, resamples=3, pairs="all")
    run, first = spoken_for(opened(folder), VARYING)
    results = credit(run, options)
    pairs = lines_of(folder, "local", "pairs")
    run, engine = spoken_for(opened(folder), VARYING)
    again = credit(run, options)
    assert len(first.requests) > len(engine.requests) == again["requests"]["sampled"] == NUM_TASKS * 4 * 3
    assert again["rows"] == results["rows"] and lines_of(folder, "local", "pairs") == pairs != []


@pytest.mark.parametrize("pairs", ["faults", "all"])
def test_equal_texts_of_different_tokens_make_no_pair(folder: Path, pairs) -> None:
    # The recorded answers are cut off, their alternatives end; the reviser is right after those that end.
    record(folder, always(solver="right", reviser="wrong"))
    run = opened(folder)
    script, end = Scripted(run, HONEST), run.tokenizer.eos_token_id
    wrong = Scripted(run, always(reviser="wrong"))

    def ending(request: Request) -> Completion | str:
        cue = run.tokenizer.decode(request.prompt_ids)[-1]
        if cue == "R" and end not in request.prompt_ids:
            return wrong(request)
        text = script(request)
        if cue != "S":
            return text
        ids = (*run.tokenizer.encode(text, add_special_tokens=False), end)
        return Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), text=text, finish="stop")

    run = replace(run, engine=ScriptedEngine(ending, run.tokenizer))
    results = credit(run, CreditOptions(method="first_error", replays=1, epsilon=0.5, resamples=2, pairs=pairs))
    assert results["agents"]["solver"]["first_errors"] == NUM_TASKS, "the tokens do make a difference"
    assert not [row for row in lines_of(folder, "first_error", "pairs") if row["agent"] == "solver"]


def test_traces_that_cannot_get_credit_are_counted_by_reason(folder: Path) -> None:
    traces = record(folder, HONEST)
    file = folder / "traces" / "rollout.jsonl"
    failed = replace(traces[0].turns[1], finish="error", completion_ids=(), behavior_logprobs=(), text="", error="too long")
    trace_store.write(file, [replace(traces[0], reward=None), replace(traces[1], reward=None)])
    trace_store.write(file, [replace(traces[2], turns=(traces[0].turns[0], failed, *traces[0].turns[2:]))])
    run, _ = spoken_for(opened(folder), HONEST)
    results = credit(run, CreditOptions(method="outcome"))
    assert results["traces"] == {
        "file": "rollout", "credited": NUM_TASKS, "missing": 0, "unfinished": 2, "with a failed turn": 1,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["shapley", "first_error", "reward_blame"])
def test_a_trace_whose_every_replay_fails_is_missing_and_counted(folder: Path, method) -> None:
    traces = record(folder, CORRUPTED)
    lost = traces[3].task.compact
    run = opened(folder)
    run, _ = spoken_for(run, HONEST, fails=lambda request: run.tokenizer.decode(request.prompt_ids).startswith(f"Q{lost}"))
    results = credit(run, CreditOptions(method=method, replays=2))
    assert (results["traces"]["credited"], results["traces"]["missing"]) == (NUM_TASKS - 1, 1)
    assert all(entry["message"]["n"] == NUM_TASKS - 1 for entry in results["agents"].values())
    [file] = (folder / "traces").glob("credit-*.jsonl")
    assert traces[3].task.id not in {trace.task.id for trace in trace_store.read(file)}


def test_when_nothing_can_be_valued_the_summary_says_so(folder: Path) -> None:
    record(folder, CORRUPTED)
    run, _ = spoken_for(opened(folder), HONEST, fails=lambda request: True)
    results = credit(run, CreditOptions(method="shapley"))
    assert results["traces"]["missing"] == NUM_TASKS and results["agents"] == {} and results["accuracy"] is None
    assert f"{NUM_TASKS} missing" in " ".join(build_report(folder).read_text().split())


def test_half_failing_replays_still_give_credit(folder: Path) -> None:
    record(folder, VARYING)
    run, _ = spoken_for(opened(folder), VARYING, fails=lambda request: request.seed % 5 < 2)
    results = credit(run, CreditOptions(method="shapley", replays=16))
    assert results["traces"]["missing"] == 0 and results["agents"]["solver"]["phi"]["mean"] > 0


def test_an_alternative_that_cannot_be_valued_makes_no_pair_and_is_counted(folder: Path) -> None:
    answers = {trace.task.compact: trace.task.answer for trace in record(folder, CORRUPTED)}
    run = opened(folder)

    def after_a_right_answer(request: Request) -> bool:
        prompt = run.tokenizer.decode(request.prompt_ids)
        return prompt[-1] == "C" and prompt[5:8] == answers[prompt[1:4]]

    run, _ = spoken_for(run, HONEST, fails=after_a_right_answer)
    results = credit(run, CreditOptions(method="local", replays=2, resamples=3, pairs="all"))
    assert (results["rows"]["unvalued"], results["rows"]["pairs"]) == (3 * NUM_TASKS, 0)


# ---- what is left behind


def test_a_run_replaces_its_own_files_and_no_others(folder: Path) -> None:
    record(folder, CORRUPTED)
    run, _ = spoken_for(opened(folder), HONEST)
    for method in ("reward_blame", "first_error"):
        credit(run, CreditOptions(method=method, resamples=1))
    other = lines_of(folder, "first_error", "pairs")
    names = ("faults.jsonl", "pairs.jsonl", "steps.jsonl", "summary.json", "traces.jsonl")
    assert tuple(sorted(file.name for file in (folder / "credit" / "reward_blame-removal").iterdir())) == names
    record(folder, HONEST)
    credit(run, CreditOptions(method="reward_blame", limit=3))
    found = sorted(file.name for file in (folder / "credit" / "reward_blame-removal").iterdir())
    assert found == ["steps.jsonl", "summary.json", "traces.jsonl"], "nobody failed: neither pairs nor faults are left"
    assert len(lines_of(folder, "reward_blame-removal", "steps")) == 3
    assert lines_of(folder, "first_error", "pairs") == other != []


def test_every_localizer_has_a_folder_of_its_own(folder: Path) -> None:
    record(folder, CORRUPTED)
    run, _ = spoken_for(opened(folder), HONEST)
    for localizer in ("value", "checks"):
        credit(run, CreditOptions(method="first_error", localizer=localizer, replays=2))
    assert len(lines_of(folder, "first_error", "faults")) == NUM_TASKS
    assert len(lines_of(folder, "first_error-checks", "traces")) == NUM_TASKS
    assert (folder / "traces" / "credit-first_error-checks.jsonl").exists()


def test_known_outcomes_are_those_from_disk_that_this_run_has_asked_for(folder: Path) -> None:
    record(folder, HONEST)
    run, _ = spoken_for(opened(folder), HONEST)

    def known(method, **options: Any) -> int:
        return credit(run, CreditOptions(method=method, replays=2, **options))["requests"]["known"]

    assert known("shapley") == 0, "what this run has sampled itself was not known before"
    # Plays that differ, as in test_replays: nobody, S, R, SR, CR and SCR. Leave-one-out asks for all of them but R.
    assert known("shapley") == NUM_TASKS * 2 * 6
    assert known("shapley", limit=1) == 2 * 6
    assert known("shapley", seed=1) == 0
    assert known("loo", limit=1) == 2 * 5
    assert known("outcome") == 0


def test_the_interval_is_student_s_over_questions(folder: Path) -> None:
    record(folder, {"solver": often, "reviser": lambda request: "repeats"})
    results = credit(opened(folder), CreditOptions(method="outcome"))
    for entry in results["agents"].values():
        assert 0 < entry["message"]["mean"] < 1
        # The printed table of t: 2.365 at 7 degrees of freedom.
        assert entry["message"]["half_width"] == pytest.approx(2.365 * entry["message"]["standard_error"], rel=2e-4)
    console = Console(record=True, width=200, file=StringIO())
    print_credit(console, results, folder)
    message = results["agents"]["solver"]["message"]
    assert console.export_text().count(f"{message['mean']:+.3f} +- {message['half_width']:.3f}") == 4
    alone = credit(opened(folder), CreditOptions(method="outcome", limit=1))
    assert all(entry["message"]["half_width"] is None for entry in alone["agents"].values())


@pytest.mark.parametrize(("epsilon", "replays", "expected"), [(0.0, 1, 0.5), (0.0, 4, 0.375), (0.0, 16, 0.15), (0.25, 4, 0.25)])
def test_the_least_drop_that_is_an_error_follows_the_replays(epsilon: float, replays: int, expected: float) -> None:
    options = CreditOptions(method="first_error", epsilon=epsilon, replays=replays)
    assert options.settings.epsilon == expected


# ---- two ranks

TWO_RANKS = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_credit import TOGETHER, VARYING, credit, opened, spoken_for
from mas_hpc.distributed.world import World, connected
with connected(World.from_env()) as world:
    for options in TOGETHER:
        credit(spoken_for(opened(Path({folder!r}), world), VARYING)[0], options)
"""
TOGETHER = (
    CreditOptions(method="shapley", value="masked", replays=3), CreditOptions(method="loo", replays=2, value="resample"),
    CreditOptions(method="reward_blame", replays=4, resamples=2), CreditOptions(method="first_error", replays=4),
)  # fmt: skip


@pytest.mark.slow
def test_two_ranks_give_the_summary_of_one(folder: Path, tmp_path: Path) -> None:
    record(folder, VARYING)
    other = shutil.copytree(folder, tmp_path / "other")
    expected = [credit(spoken_for(opened(folder), VARYING)[0], options) for options in TOGETHER]
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(here=str(Path(__file__).parent), folder=str(other)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for options, one in zip(TOGETHER, expected, strict=True):
        assert json.loads((other / "credit" / options.name / "summary.json").read_text()) == one
        for kind in ("traces", "pairs", "steps", "faults"):
            assert lines_of(other, options.name, kind) == lines_of(folder, options.name, kind)
        name = f"traces/credit-{options.name}.jsonl"
        assert [trace.path for trace in trace_store.read(other / name)] == [t.path for t in trace_store.read(folder / name)]
    assert lines_of(folder, "reward_blame-removal", "pairs")
    found = sorted(file.name for file in (other / "credit").glob("values*"))
    assert found == ["values.rank0.jsonl", "values.rank1.jsonl"]
