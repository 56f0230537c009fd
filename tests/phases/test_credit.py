"""mas-hpc credit on a scripted team whose faults are known."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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
from mas_hpc.data import trace_store
from mas_hpc.data.preferences import Pair, load_preferences
from mas_hpc.data.steps import load_steps
from mas_hpc.data.tasks import load_tasks
from mas_hpc.evaluation.report.build import build_report
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.phases.credit import CreditOptions, credit
from mas_hpc.phases.credit import record as as_record
from mas_hpc.phases.credit_results import print_credit
from mas_hpc.phases.replays import Game
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.run import Run, how_to_play, play_all
from mas_hpc.types import Trace
from tests.phases.conftest import NUM_TASKS, ROOT, opened

FAILED = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")


class Scripted:
    """Speaks for the team: an agent is right, wrong by one digit, or repeats the answer that it has read last."""

    def __init__(self, run: Run, says: Mapping[str, Callable[[Request], str]]) -> None:
        train, test = load_tasks(run.config.data)
        self._answers = {task.compact: task.answer for task in (*train, *test)}
        self._decode = run.tokenizer.decode
        self._agents = {agent.role.letter: name for name, agent in run.team.agents.items()}
        self._says = says

    def __call__(self, request: Request) -> str:
        prompt = self._decode(request.prompt_ids)
        agent = self._agents[prompt[-1]]
        if agent in ("critic", "verifier"):
            return "===+"
        sums = prompt.rpartition("Q")[2][:3]
        right = self._answers[sums]
        read = prompt.removesuffix(f"Q{sums}R").rpartition("S")[2][:3] if agent == "reviser" and "S" in prompt else right
        wrong = f"{(int(right[0]) + 1) % 4}{right[1:]}"
        return {"right": right, "wrong": wrong, "repeats": read}[self._says[agent](request)]


def always(**says: str) -> Mapping[str, Callable[[Request], str]]:
    return {agent: (lambda request, word=word: word) for agent, word in says.items()}


def often(request: Request) -> str:
    """Right in one of two."""
    return ("right", "wrong")[hashlib.blake2b(f"{request.seed}".encode(), digest_size=1).digest()[0] % 2]


def spoken_for(run: Run, says: Mapping[str, Callable[[Request], str]], *, fails: Callable[[Request], bool] | None = None):
    """The run with a script instead of its model, and the engine that counts."""
    script = Scripted(run, says)
    engine = ScriptedEngine(lambda request: FAILED if fails and fails(request) else script(request), run.tokenizer)
    return replace(run, engine=engine), engine


def record(folder: Path, says: Mapping[str, Callable[[Request], str]], label: str = "rollout") -> list[Trace]:
    """Traces of a scripted team in place of the model's."""
    run, _ = spoken_for(opened(folder), says)
    (folder / "traces" / f"{label}.jsonl").unlink(missing_ok=True)
    _, tasks = load_tasks(run.config.data)
    return play_all(run, tasks, how_to_play(run, Sampling(temperature=1.0), 0), label=label)


HONEST = always(solver="right", reviser="repeats")
CORRUPTED = always(solver="wrong", reviser="repeats")
VARYING = {"solver": often, "reviser": lambda request: "right" if request.seed % 3 else "repeats"}


def lines_of(folder: Path, run: str, name: str) -> list[Any]:
    """Rows that a credit run of that name has written; none where it wrote no file."""
    file = folder / "credit" / run / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- the scripted team


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


# ---- which traces


def test_parts_of_several_ranks_are_one_file(folder: Path) -> None:
    traces = record(folder, HONEST)
    (folder / "traces" / "rollout.jsonl").unlink()
    trace_store.write(folder / "traces" / "rollout.rank0.jsonl", traces[::2])
    trace_store.write(folder / "traces" / "rollout.rank1.jsonl", traces[1::2])
    run, _ = spoken_for(opened(folder), HONEST)
    for name in ("", "rollout"):
        assert credit(run, CreditOptions(method="outcome", traces=name))["traces"]["credited"] == NUM_TASKS


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("rollout", "after-T1", "train"), "rollout"),
        (("before-T1", "after-T0", "after-T1", "train"), "after-T1"),
        (("evaluate-T0", "evaluate-T0.7"), "evaluate-T0.7"),
        (("rollout", "credit-local"), "rollout"),
    ],
)
def test_the_file_is_the_one_that_most_likely_is_meant(folder: Path, present: Sequence[str], chosen: str) -> None:
    traces = record(folder, HONEST)
    (folder / "traces" / "rollout.jsonl").unlink()
    for name in present:
        trace_store.write(folder / "traces" / f"{name}.jsonl", traces)
    assert credit(opened(folder), CreditOptions(method="outcome"))["traces"]["file"] == chosen


def test_replays_have_the_temperature_of_the_file(folder: Path) -> None:
    traces = record(folder, HONEST)
    for name, temperature in (("evaluate-T0", 0.0), ("evaluate-T0.7", 0.7), ("rollout", 1.0)):
        (folder / "traces" / f"{name}.jsonl").unlink(missing_ok=True)
        trace_store.write(folder / "traces" / f"{name}.jsonl", traces)
        run, engine = spoken_for(opened(folder), HONEST)
        credit(run, CreditOptions(method="loo", replays=1, traces=name))
        assert {request.sampling.temperature for request in engine.requests} == {temperature}


def test_a_limit_takes_the_first_traces(folder: Path) -> None:
    traces = record(folder, HONEST)
    credit(opened(folder), CreditOptions(method="outcome", limit=3))
    found = list(trace_store.read(folder / "traces" / "credit-outcome.jsonl"))
    assert [trace.task.id for trace in found] == [trace.task.id for trace in traces[:3]]


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
