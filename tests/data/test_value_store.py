"""Outcomes on disk: read by everybody, appended by one, whole after a kill."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mas_hpc.data.value_store import ValueStore, path_digest
from mas_hpc.errors import DataError
from mas_hpc.types import Turn

SOLVER, NOBODY = frozenset({"solver"}), frozenset[str]()
TURN = Turn(
    id="q/0", parent=None, task_id="q", agent="solver", policy="p", index=0, prompt_ids=(1, 2), prompt_spans=(("", 2),),
    completion_ids=(3,), behavior_logprobs=(-1.0,), text="3", finish="stop",
)  # fmt: skip


def filled(folder: Path, rank: int = 0) -> ValueStore:
    """Two subjects' outcomes, flushed."""
    store = ValueStore(folder, rank=rank)
    store.of("q | removal")[SOLVER, 0] = 1.0
    store.of("q | removal")[NOBODY, 3] = 0.0
    store.of("q | prefix")[2, 1] = 0.5
    store.flush()
    return store


def test_outcomes_are_found_again_under_their_subject_only(tmp_path: Path) -> None:
    filled(tmp_path)
    again = ValueStore(tmp_path, rank=0)
    assert dict(again.of("q | removal")) == {(SOLVER, 0): 1.0, (NOBODY, 3): 0.0}
    assert dict(again.of("q | prefix")) == {(2, 1): 0.5}
    assert len(again.of("r | removal")) == 0


def test_members_of_a_coalition_have_no_order(tmp_path: Path) -> None:
    store = ValueStore(tmp_path, rank=0)
    store.of("q")[frozenset(["b", "a", "c"]), 0] = 1.0
    store.flush()
    assert ValueStore(tmp_path, rank=0).of("q")[frozenset(["c", "b", "a"]), 0] == 1.0
    assert '["a", "b", "c"]' in (tmp_path / "values.rank0.jsonl").read_text()


def test_failures_are_known_to_this_run_and_tried_again_by_the_next(tmp_path: Path) -> None:
    store = ValueStore(tmp_path, rank=0)
    store.of("q")[SOLVER, 0] = math.nan
    store.flush()
    assert math.isnan(store.of("q")[SOLVER, 0])
    assert not (tmp_path / "values.rank0.jsonl").exists()
    assert (SOLVER, 0) not in ValueStore(tmp_path, rank=0).of("q")


def test_a_flush_writes_what_is_new_and_nothing_twice(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.flush()
    store.of("q | prefix")[0, 0] = 1.0
    store.flush()
    assert len((tmp_path / "values.rank0.jsonl").read_text().splitlines()) == 4


def test_used_are_the_outcomes_from_disk_that_were_asked_for_each_once(tmp_path: Path) -> None:
    filled(tmp_path)
    stores = [ValueStore(tmp_path, rank=rank) for rank in (0, 1)]
    assert stores[0].used == []
    for store in stores:
        outcomes = store.of("q | removal")
        assert (SOLVER, 1) not in outcomes and (SOLVER, 0) in outcomes and outcomes[SOLVER, 0] == 1.0
        outcomes[SOLVER, 1] = 0.0
        assert outcomes[SOLVER, 1] == 0.0, "sampled by this run, and asked for again"
        assert len(store.used) == 1
    assert stores[0].used == stores[1].used
    assert stores[0].of("q | prefix")[2, 1] == 0.5
    assert len(stores[0].used) == 2 and set(stores[1].used) < set(stores[0].used)


def test_every_rank_reads_all_files_and_appends_to_its_own(tmp_path: Path) -> None:
    filled(tmp_path, rank=0)
    second = ValueStore(tmp_path, rank=1)
    second.of("r")[SOLVER, 0] = 1.0
    second.flush()
    for rank in (0, 1, 2):
        store = ValueStore(tmp_path, rank=rank)
        assert store.of("q | removal")[SOLVER, 0] == 1.0
        assert store.of("r")[SOLVER, 0] == 1.0 and store.of("q | prefix")[2, 1] == 0.5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["values.rank0.jsonl", "values.rank1.jsonl"]


def test_a_torn_last_line_is_ignored_and_mended_by_the_next_flush(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path)
    file = tmp_path / "values.rank0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    store = ValueStore(tmp_path, rank=0)
    assert len(store.of("q | removal")) == 2 and len(store.of("q | prefix")) == 0
    store.of("q | prefix")[2, 1] = 0.5
    with caplog.at_level(logging.WARNING):
        store.flush()
    assert file.read_bytes() == whole and "incomplete last line" in caplog.text


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    filled(tmp_path)
    file = tmp_path / "values.rank0.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    store = ValueStore(tmp_path, rank=0)
    store.of("r")[SOLVER, 0] = 1.0
    store.flush()
    again = ValueStore(tmp_path, rank=0)
    assert [len(again.of(subject)) for subject in ("q | removal", "q | prefix", "r")] == [2, 1, 1]


@pytest.mark.parametrize("line", ['["q", [], 0]', "7", '{"q": 1}', '["q", [["a"]], 0, 1.0]', '["q", [], 0, "x"]', "garbage"])
def test_a_line_that_is_no_outcome_is_named(tmp_path: Path, line: str) -> None:
    filled(tmp_path)
    file = tmp_path / "values.rank0.jsonl"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(DataError, match=r"values\.rank0\.jsonl:1: .*expected \[subject, question, replay, outcome\].*remove"):
        ValueStore(tmp_path, rank=0)


def test_a_path_is_named_by_what_was_read_and_written_and_by_whom() -> None:
    same = replace(TURN, id="elsewhere", policy_version=3, wall_s=2.0, text="?")
    assert path_digest((TURN,)) == path_digest((same,))
    others = [replace(TURN, agent="critic"), replace(TURN, prompt_ids=(1,)), replace(TURN, completion_ids=(3, 4))]
    assert len({path_digest(path) for path in ((TURN,), (), (TURN, TURN), *((other,) for other in others))}) == 6
