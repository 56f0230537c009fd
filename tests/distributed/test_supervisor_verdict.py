"""What ends of ranks mean, and when a restart is refused."""

from __future__ import annotations

from dataclasses import replace

from mas_hpc.distributed.heartbeats import Heartbeat, LastError
from mas_hpc.distributed.supervisor_verdict import Ending, Found, Restarts, explain, judge

ERROR = LastError(rank=1, code=70, kind="ValueError", message="0x7f is bad", place="learner.py:93", phase="train", step=7)
BEAT = Heartbeat(
    rank=1, phase="train", step=7, count=3, beat=9, num_kept=0, stall_s=4.0, pid=1, host="a", time_s=0.0
)  # fmt: skip
FOUND = Found(codes=(75, 70), tells_apart=True, stalled=frozenset(), errors=(ERROR,), heartbeats={1: BEAT})


def test_what_exit_codes_mean_where_the_others_finish_the_work_of_the_dead() -> None:
    assert judge([None, None], outlives=True) == "running"
    assert judge([None, 0], outlives=True) == "running"
    assert judge([None, -9], outlives=True) == "running"  # the others go on
    assert judge([0, None], outlives=True) == "done"
    assert judge([0, -9], outlives=True) == "done"
    assert judge([-9, None], outlives=True) == "died"
    assert judge([-9, 0], outlives=True) == "died"
    assert judge([1, None], outlives=True) == "failed"
    assert judge([None, 1], outlives=True) == "failed"
    assert judge([0, 1], outlives=True) == "failed"
    assert judge([1, -9], outlives=True) == "died"  # it could not go on without the other
    assert judge([None, 1, -11], outlives=True) == "died"


def test_what_exit_codes_mean_where_ranks_need_each_other() -> None:
    assert judge([None, -9], outlives=False) == "died"
    assert judge([0, -9], outlives=False) == "done"
    assert judge([None, None], outlives=False) == "running"


def test_a_cause_comes_before_its_consequences() -> None:
    assert judge([75, None], outlives=False) == "lost"
    assert judge([75, 70], outlives=False) == "broke"
    assert judge([75, 74], outlives=False) == "broke"  # a full disk
    assert judge([124, 75], outlives=False) == "hung"
    assert judge([75, 71], outlives=False) == "failed"  # out of memory
    assert judge([70, 1], outlives=False) == "failed"
    assert judge([124, -9], outlives=False) == "died"
    assert judge([None, 130], outlives=False) == "failed"


def test_the_rank_that_broke_off_is_told_with_its_step_and_place() -> None:
    ending = explain("broke", FOUND)
    assert ending.what == "rank 1 broke off at train 7: ValueError: 0x7f is bad (learner.py:93)"
    assert ending.causes == {("ValueError", "learner.py:93", "train", 7)}


def test_what_failed_is_told_in_the_words_of_the_rank_where_it_has_left_any() -> None:
    mistake = replace(ERROR, rank=2, code=1, kind="DataError", message="x.jsonl: no such file", phase="loading", step=0)
    found = replace(FOUND, codes=(70, 70, 1), errors=(ERROR, mistake))
    assert explain("failed", found).what == "rank 2 failed at loading 0: x.jsonl: no such file"
    assert explain("failed", replace(found, errors=())).what == "ranks [0, 1, 2] failed; their messages are above"


def test_ranks_that_were_asked_to_end_have_not_failed() -> None:
    assert judge([85, None], outlives=False) == "stopped"
    assert judge([85, 75], outlives=False) == "lost"
    assert explain("stopped", replace(FOUND, codes=(85, 85), errors=())).causes == frozenset()


def test_an_error_that_is_a_consequence_is_no_cause() -> None:
    lost = replace(ERROR, rank=0, code=75, kind="LostPeerError")
    ending = explain("lost", replace(FOUND, codes=(75, None), errors=(lost,)))
    what = "ranks [0] lost another, which has not said why"
    assert ending == Ending(verdict="lost", what=what, lost=("0x7f is bad",))


def test_a_kill_comes_from_outside_and_a_crash_from_the_program() -> None:
    killed = explain("died", replace(FOUND, codes=(75, -9), errors=()))
    crashed = explain("died", replace(FOUND, codes=(75, -11), errors=()))
    assert (killed.what, killed.causes) == ("rank 1 died of SIGKILL", frozenset())
    assert (crashed.what, crashed.causes) == ("rank 1 died of SIGSEGV", {("SIGSEGV", "train", 7)})


def test_who_was_ended_for_its_silence_has_hung_whoever_tells_it() -> None:
    found = replace(FOUND, codes=(None, -9), errors=(), stalled=frozenset({1}))
    assert explain("died", found) == Ending(verdict="hung", what="rank 1 gave no sign of life", silent=frozenset({1}))
    together = replace(found, codes=(-9, -9), tells_apart=False)  # mpiexec tells one code of all
    assert explain("died", together).verdict == "hung"
    assert explain("died", replace(found, codes=(-9, -9))).what == "rank 0, 1 died of SIGKILL", "0 was not silent"


def test_what_was_kept_by_any_rank_is_a_later_point_to_start_from() -> None:
    assert not explain("died", replace(FOUND, codes=(-9, None))).has_kept
    assert explain("died", replace(FOUND, codes=(-9, None), heartbeats={1: replace(BEAT, num_kept=1)})).has_kept


DIED = Ending(verdict="died", what="rank 1 died of SIGKILL")


def test_restarts_are_bounded_and_wait_longer_each_time() -> None:
    restarts, delays = Restarts(3), []
    while not (reason := restarts.refuse(DIED)):
        delays.append(restarts.delay_s)
    assert delays == [1.0, 2.0, 4.0]
    assert reason == (
        "rank 1 died of SIGKILL, and the ranks were started 4 times in a row without getting further (--max-restarts 3)"
    )


def test_an_attempt_that_has_kept_something_renews_the_restarts() -> None:
    restarts = Restarts(1)
    assert [restarts.refuse(replace(DIED, has_kept=kept)) == "" for kept in (False, True, True, False)] == [
        True, True, True, False
    ]  # fmt: skip


def test_the_same_error_at_the_same_step_is_not_tried_a_third_time() -> None:
    restarts, broke = Restarts(9), explain("broke", FOUND)
    later = explain("broke", replace(FOUND, errors=(replace(ERROR, step=8),)))
    assert [restarts.refuse(one) for one in (broke, later, broke)] == ["", "", ""]
    assert "as before the restart, at the same step" in restarts.refuse(broke)


def test_kills_at_the_same_step_are_not_the_program_s() -> None:
    restarts, killed = Restarts(9), explain("died", replace(FOUND, codes=(75, -9), errors=()))
    assert [restarts.refuse(killed) for _ in range(3)] == ["", "", ""]
