"""Episodes over ranks that meet in a store only: dealt out, kept, taken up again, and counted. Ranks are threads here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from torch.distributed import HashStore

from mas_hpc import rollouts
from mas_hpc.config_file import load_config
from mas_hpc.data import trace_store
from mas_hpc.data.tasks import load_tasks
from mas_hpc.distributed.notes import from_first, tell_first
from mas_hpc.distributed.shared_tickets import declare_gone
from mas_hpc.distributed.tickets import open_tickets
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError, DataError, RolloutError
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.resume import check_resumable
from mas_hpc.rollout.engine import Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollouts import Played, finished, how_to_play, play_all, play_counted
from mas_hpc.run import Run, build, claim_folder, write_config
from mas_hpc.training.log import MetricsLog
from mas_hpc.types import Task, Trace
from tests.phases.conftest import QUICKSTART, opened
from tests.phases.scripted_team import VARYING, spoken_for


def tasks_of(run: Run) -> Sequence[Task]:
    return load_tasks(run.config.data)[1]


def ranks_of(folder: Path, size: int) -> list[Run]:
    """The run on ranks that share a store and the folder, each with its own engine."""
    store = HashStore()
    log = [MetricsLog(folder, is_writer=rank == 0, tracking="none") for rank in range(size)]
    worlds = [World(rank=rank, size=size, store=store, run_store=store) for rank in range(size)]
    return [replace(spoken_for(opened(folder), VARYING)[0], world=world, log=log[world.rank]) for world in worlds]


def episodes(run: Run, label: str = "many", **options) -> Played:
    how = how_to_play(run, Sampling(temperature=1.0, episodes=2), 0)
    return play_counted(run, tasks_of(run), how, label=label, **options)


def at_once(runs: Sequence[Run], **options) -> list[Played]:
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: episodes(run, **options), runs))


def written(folder: Path, label: str = "many") -> list[Trace]:
    return [trace for part in trace_store.parts(folder / "traces", label) for trace in trace_store.read(part)]


def last_metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def names(traces: Sequence[Trace]) -> list[str]:
    return [trace.turns[0].id for trace in traces]


@pytest.fixture
def alone(folder: Path) -> list[Trace]:
    """What one rank gets."""
    run, _ = spoken_for(opened(folder), VARYING)
    return episodes(run, keep=False).traces


def test_two_ranks_get_what_one_gets_and_every_episode_is_in_one_file(folder: Path, alone: list[Trace]) -> None:
    first, second = at_once(ranks_of(folder, 2))
    assert first.traces == second.traces == alone
    assert sorted(names(written(folder))) == sorted(names(alone))
    shares = [list(trace_store.read(part)) for part in trace_store.parts(folder / "traces", "many")]
    assert len(shares) == 2 and all(shares), "both have played"


def test_the_first_rank_counts_the_work_of_all(folder: Path, alone: list[Trace]) -> None:
    first, _ = at_once(ranks_of(folder, 2))
    turns = [turn for trace in alone for turn in trace.turns]
    assert first.account.stats.requests == len(turns) and first.account.num_ranks == 2
    line = last_metrics(folder)
    assert (line["phase"], line["rollout/requests"]) == ("many", len(turns))
    assert line["rollout/prompt_tokens"] == sum(len(turn.prompt_ids) for turn in turns)
    assert {"latency/solver", "latency_p95/verifier"} <= line.keys()


def test_what_is_not_kept_is_not_written_and_gets_no_line_of_metrics(folder: Path) -> None:
    before = (folder / "metrics.jsonl").read_text()
    at_once(ranks_of(folder, 2), keep=False)
    assert written(folder) == [] and (folder / "metrics.jsonl").read_text() == before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a rank that has died."""
    monkeypatch.setattr(rollouts, "LEAVE_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_the_episodes_of_a_rank_that_died_are_played_by_another(folder: Path, alone: list[Trace]) -> None:
    first, second = ranks_of(folder, 2)
    settings = first.config.rollout.model_copy(update={"stall_s": 0.2})
    first = replace(first, config=first.config.model_copy(update={"rollout": settings}))
    assert open_tickets(second.world, "many", len(alone), stall_s=0.2).take(0, 3) == [0, 1, 2]
    played = episodes(first)
    assert played.traces == alone and played.account.num_ranks == 1
    assert sorted(names(written(folder))) == sorted(names(alone))


@pytest.mark.usefixtures("impatient")
def test_what_a_rank_handed_in_and_did_not_live_to_write_is_written_by_the_first(folder: Path, alone: list[Trace]) -> None:
    first, second = ranks_of(folder, 2)
    tickets = open_tickets(second.world, "many", len(alone), stall_s=100.0)
    [job] = tickets.take(0, 1)
    assert tickets.finish(job, trace_store.to_json(replace(alone[job], label="many")).encode())
    assert names(episodes(first).traces) == names(alone)
    assert sorted(names(written(folder))) == sorted(names(alone))


@pytest.mark.parametrize(("every_s", "expected"), [(1e9, 2), (0.0, 16)])
def test_traces_are_forced_to_disk_now_and_then_and_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, expected: int
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(len(os.pread(file, 1 << 30, 0).splitlines())))
    monkeypatch.setattr(rollouts, "SYNC_S", every_s)
    run, _ = spoken_for(opened(folder), VARYING)
    episodes(run)
    assert len(synced) == expected and synced[-1] == 16 and len(written(folder)) == 16


def test_an_interruption_keeps_what_nobody_has_yet(folder: Path, alone: list[Trace]) -> None:
    asked: list[Request] = []

    def interrupted(request: Request) -> str:
        asked.append(request)
        if len(asked) > 20:
            raise KeyboardInterrupt
        return "0120"

    run = opened(folder)
    with pytest.raises(KeyboardInterrupt):
        episodes(replace(run, engine=ScriptedEngine(interrupted, run.tokenizer)), keep=False)
    kept = written(folder)
    assert sorted(names(kept)) == sorted(names(alone)) and all(len(trace.turns) == 1 for trace in kept)
    assert {trace.label for trace in kept} == {"many:unfinished"}


# ---- after a restart


def stopped(folder: Path, traces: Sequence[Trace]) -> None:
    """Files as two ranks leave them that are killed while they write."""
    kept = [replace(trace, label="many") for trace in traces]
    for rank, mine in enumerate((kept[:3], kept[7:9])):
        file = folder / "traces" / f"many.rank{rank}.jsonl"
        trace_store.write(file, mine)
        with file.open("a") as stream:
            stream.write(trace_store.to_json(kept[10 + rank])[:100])


@pytest.mark.parametrize("size", [1, 2])
def test_a_restarted_run_plays_only_what_no_file_holds(folder: Path, alone: list[Trace], size: int, caplog) -> None:
    stopped(folder, alone)
    runs = [replace(run, resumes=True) for run in ranks_of(folder, size)]
    with caplog.at_level(logging.WARNING):
        played = at_once(runs)
    assert "incomplete last line" in caplog.text
    missing = [*alone[3:7], *alone[9:]]
    assert played[0].account.stats.requests == sum(len(trace.turns) for trace in missing)
    assert all(one.traces == [replace(trace, label="many") for trace in alone] for one in played)
    assert sorted(names(written(folder))) == sorted(names(alone)), "no task twice"
    again = at_once([replace(run, resumes=True) for run in ranks_of(folder, size)])
    assert again[0].traces == played[0].traces and again[0].account.stats.requests == 0


def test_a_fresh_run_reads_no_files(folder: Path, alone: list[Trace]) -> None:
    stopped(folder, alone)
    [played] = at_once(ranks_of(folder, 1))
    assert played.account.stats.requests == sum(len(trace.turns) for trace in alone)


def test_traces_of_other_steps_questions_and_plays_are_not_taken_for_these(folder: Path, alone: list[Trace]) -> None:
    others = [
        replace(alone[0], step=1), replace(alone[1], label="many:unfinished"),
        replace(alone[2], task=replace(alone[2].task, answer="?")), replace(alone[4], label="few"),
    ]  # fmt: skip
    trace_store.write(folder / "traces" / "many.jsonl", [*others, replace(alone[5], label="many")])
    run = opened(folder)
    how = replace(how_to_play(run, Sampling(temperature=1.0, episodes=2), 0), label="many")
    assert list(finished(folder / "traces", tasks_of(run), how)) == [5]


def test_restarted_ranks_get_the_folder_they_had(tmp_path: Path) -> None:
    store = HashStore()
    first, wanted = World(run_store=store), tmp_path / "mas"
    wanted.mkdir()
    assert claim_folder(wanted, first) == tmp_path / "mas-2"
    assert claim_folder(wanted, replace(first, attempt=1)) == tmp_path / "mas-2"
    assert claim_folder(wanted, first) == tmp_path / "mas-3", "another run of that name"
    assert claim_folder(wanted, World(attempt=1, run_store=HashStore())) == tmp_path / "mas-4", "it died before it had one"


def test_a_run_is_taken_up_in_its_folder_with_its_own_configuration_only(tmp_path: Path) -> None:
    config = load_config(Path(QUICKSTART), [f"runs_dir={tmp_path}", "name=mas"])
    with pytest.raises(DataError, match=r"no config\.yaml"):
        build(config, World(), Console(quiet=True), resume=tmp_path / "mas")
    (tmp_path / "mas").mkdir()
    write_config(config, tmp_path / "mas")
    run = build(config.model_copy(update={"name": "other"}), World(), Console(quiet=True), resume=tmp_path / "mas")
    assert run.resumes and run.folder == tmp_path / "mas" and not (tmp_path / "other").exists()
    check_resumable(
        config.model_copy(update={"rollout": config.rollout.model_copy(update={"stall_s": 900.0})}), tmp_path / "mas"
    )
    with pytest.raises(ConfigError, match="seed: not as in"):
        build(config.model_copy(update={"seed": 7}), World(), Console(quiet=True), resume=tmp_path / "mas")


def test_a_folder_that_a_run_is_writing_to_is_not_taken_up_by_another(tmp_path: Path) -> None:
    config = load_config(Path(QUICKSTART), [f"runs_dir={tmp_path}", "name=mas"])
    live = build(config, World(), Console(quiet=True))
    with pytest.raises(DataError, match=r"mas: another run is writing there"):
        build(config, World(), Console(quiet=True), resume=tmp_path / "mas")
    live.close()
    assert build(config, World(), Console(quiet=True), resume=tmp_path / "mas").resumes


def test_only_training_asks_for_a_number_of_ranks_that_divides_its_batch(tmp_path: Path) -> None:
    config, three = load_config(Path(QUICKSTART), [f"runs_dir={tmp_path}"]), World(size=3, launcher="torchrun")
    with pytest.raises(ConfigError, match=r"method\.tasks_per_step=16: 3 ranks do not divide it"):
        build(config, three, Console(quiet=True), resume=tmp_path / "none")
    with pytest.raises(DataError, match=r"no config\.yaml"):  # what is checked after it
        build(config, three, Console(quiet=True), resume=tmp_path / "none", trains=False)


# ---- notes


def test_the_first_hears_all_that_come_in_time(tmp_path: Path) -> None:
    store = HashStore()
    worlds = [World(rank=rank, size=3, store=store) for rank in range(3)]
    for _ in range(2):  # a label may come again
        assert tell_first(worlds[1], "stats", "b", patience_s=1.0) == {1: "b"}
    assert tell_first(worlds[0], "stats", "a", patience_s=0.01) == {0: "a", 1: "b"}
    assert tell_first(worlds[0], "stats", "a", patience_s=1e9) == {0: "a", 1: "b"}, "nobody waits for rank 2 again"
    assert tell_first(World(), "stats", "a", patience_s=1.0) == {0: "a"}


def test_a_rank_that_was_declared_gone_is_not_waited_for() -> None:
    store = HashStore()
    declare_gone(store, 1)
    assert tell_first(World(size=2, store=store), "stats", "a", patience_s=1e9) == {0: "a"}


def test_what_the_first_says_is_heard_in_order_or_its_absence_is_an_error() -> None:
    store = HashStore()
    first, second = (World(rank=rank, size=2, store=store) for rank in range(2))
    for text in ("a", "b"):
        assert from_first(first, "known", text, patience_s=1.0) == text
    assert [from_first(second, "known", "?", patience_s=1.0) for _ in range(2)] == ["a", "b"]
    with pytest.raises(RolloutError, match="known: rank 1 has heard nothing from rank 0"):
        from_first(second, "known", "?", patience_s=0.01)


def test_play_all_is_the_traces_alone(folder: Path, alone: list[Trace]) -> None:
    run, _ = spoken_for(opened(folder), VARYING)
    how = how_to_play(run, Sampling(temperature=1.0, episodes=2), 0)
    assert play_all(run, tasks_of(run), how, label="many", keep=False) == alone
