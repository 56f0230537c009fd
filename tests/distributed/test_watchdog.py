"""Real ranks that get nowhere are ended in bounded time, with their stacks; what moves counts for all."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from mas_hpc.distributed import heartbeats
from mas_hpc.distributed.heartbeats import Heartbeat, LastError, last_error
from mas_hpc.distributed.watchdog import STOP, Watch, watching
from mas_hpc.distributed.world import World
from tests.distributed.launch import ROOT, run_ranks, run_supervised

SCRIPT = str(ROOT / "tests" / "distributed" / "watched_ranks.py")
BEAT = Heartbeat(
    rank=1, phase="train", step=7, count=3, beat=9, num_kept=2, stall_s=4.0, pid=11, host="a", time_s=1.5
)  # fmt: skip


def test_the_count_changes_with_every_move_and_with_what_is_counted_anyway() -> None:
    watch, steps, seen = Watch(), [5], []
    for move in (lambda: watch.at("train", 1), watch.moved, watch.kept, lambda: watch.follow(lambda: steps[0]), lambda: None):
        move()
        seen.append(watch.count)
    steps[0] += 1
    seen.append(watch.count)
    assert seen == [1, 2, 3, 8, 8, 9]
    assert (watch.phase, watch.step, watch.num_kept) == ("train", 1, 1)


def test_the_first_rank_finds_the_file_that_asks_to_end_and_tells_the_others(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [World(rank=rank, size=2, store=store) for rank in (0, 1)]
    how = {"hang_s": 60.0, "stall_s": 0.8}  # a beat is a tenth of a second
    with watching(ranks[0], **how) as first, watching(ranks[1], **how) as second:
        for world in (first, second):
            world.watch.opened(tmp_path)
        time.sleep(0.5)
        assert not first.watch.is_asked_to_end and not second.watch.is_asked_to_end
        (tmp_path / STOP).touch()
        end_s = time.monotonic() + 20.0
        while not (first.watch.is_asked_to_end and second.watch.is_asked_to_end):
            assert time.monotonic() < end_s
            time.sleep(0.05)


def test_what_ranks_say_is_read_as_it_was_said_and_the_last_counts() -> None:
    store = HashStore()
    assert heartbeats.read(store, Heartbeat, 1) is None
    error = LastError(rank=1, code=70, kind="KeyError", message="'x'", place="a.py:1", phase="train", step=7)
    for said in (error, BEAT, replace(BEAT, beat=10)):
        heartbeats.say(store, said)
    assert heartbeats.read(store, LastError, 1) == error
    beat = heartbeats.read(store, Heartbeat, 1)
    assert beat is not None and beat.beat == 10
    assert heartbeats.read(store, Heartbeat, 0) is None


def test_the_file_of_a_rank_is_replaced_whole(tmp_path: Path) -> None:
    for _ in range(2):
        heartbeats.write(tmp_path, BEAT)
    assert [file.name for file in (tmp_path / "heartbeats").iterdir()] == ["rank_1.json"]
    assert Heartbeat(**json.loads((tmp_path / "heartbeats" / "rank_1.json").read_text())) == BEAT


def test_an_error_is_placed_where_it_leaves_the_project() -> None:
    with pytest.raises(TypeError) as caught:
        heartbeats.say(HashStore(), replace(BEAT, phase=b"bytes"))  # type: ignore[arg-type]  # which json refuses
    found = last_error(caught.value, rank=1, phase="train", step=7)
    assert (found.code, found.kind, found.message) == (70, "TypeError", "Object of type bytes is not JSON serializable")
    assert found.place.startswith("heartbeats.py:")


def stacks(folder: Path, rank: int) -> str:
    return (folder / "stacks" / f"rank_{rank}.txt").read_text()


@pytest.mark.slow
def test_ranks_in_a_collective_that_never_returns_leave_their_stacks(tmp_path: Path) -> None:
    ended = run_supervised(2, 3, SCRIPT, "hangs", str(tmp_path), survivors=2)
    assert [code for code, _ in ended] == [124, 124]
    assert "nobody has got anywhere for 2 s (distributed.hang_s=2)" in ended[0][1]
    assert "rank 1 of 2" in ended[1][1] and "is at train 7" in ended[1][1]
    assert stacks(tmp_path, 1).startswith("attempt 3, train 7:\n")
    assert "collective_that_nobody_joins" in stacks(tmp_path, 1) and "in behave" in stacks(tmp_path, 0)


@pytest.mark.slow
def test_a_hang_ends_even_where_no_stacks_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").touch()  # what a full disk or a lost file server does to the folder
    ended = run_supervised(2, 0, SCRIPT, "hangs", str(tmp_path), survivors=2)
    assert [code for code, _ in ended] == [124, 124]
    assert "in behave" in ended[0][1] and "stacks/rank_0.txt cannot be written (File exists)" in ended[0][1]


@pytest.mark.slow
def test_a_stopped_rank_leaves_a_note_instead_even_where_it_hosts_the_store(tmp_path: Path) -> None:
    done = run_ranks("mpiexec", 2, SCRIPT, "stops", str(tmp_path))
    assert done.returncode == 124, done.stderr
    assert "collective_that_nobody_joins" in stacks(tmp_path, 1)
    assert stacks(tmp_path, 0).startswith("No stacks of rank 0: it was stopped")
    assert json.loads((tmp_path / "heartbeats" / "rank_0.json").read_text())["phase"] == "train"


@pytest.mark.slow
def test_a_rank_may_wait_as_long_as_another_gets_on(tmp_path: Path) -> None:
    ended = run_supervised(2, 0, SCRIPT, "waits for one that works", str(tmp_path), survivors=2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert not (tmp_path / "stacks").exists()
    last = json.loads((tmp_path / "heartbeats" / "rank_0.json").read_text())
    assert (last["phase"], last["step"], last["stall_s"]) == ("done", 19, 0.0)


@pytest.mark.slow
def test_a_call_that_keeps_python_s_lock_is_ended_all_the_same(tmp_path: Path) -> None:
    ended = run_supervised(2, 0, SCRIPT, "keeps Python's lock", str(tmp_path), survivors=2)
    assert [code for code, _ in ended] == [1, 1]
    assert "Timeout (0:00:02.500000)!" in ended[0][1] and "in behave" in ended[0][1]
