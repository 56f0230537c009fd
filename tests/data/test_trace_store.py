"""The trace store: exact round trips, and files that survive a killed writer."""

import json
import logging
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.data.trace_store import count, from_json, read, to_json, write
from mas_hpc.errors import DataError
from mas_hpc.types import Task, Trace, Turn

TASK = Task(id="q0", question="What is 6 x 7?", answer="42")
TURN = Turn(
    id="q0/0.0", parent=None, task_id="q0", agent="solver", policy="shared", index=0, prompt_ids=(1, 5),
    prompt_spans=(("", 2),), completion_ids=(9, 2), behavior_logprobs=(-0.1, -1 / 3), text="42", answer="42",
    finish="stop", seed=7, policy_version=3, wall_s=0.25, committed=True, reward=1.0, local_reward=1.0, credit=-0.5,
)  # fmt: skip
TRACE = Trace(task=TASK, turns=(TURN, replace(TURN, id="q0/1.0", parent="q0/0.0", index=1, verdict=True)), answer="42")


@st.composite
def turns(draw):
    completion = draw(st.lists(st.integers(0, 200_000), max_size=5))
    logprobs = draw(st.lists(st.floats(max_value=0), min_size=len(completion), max_size=len(completion)))
    text = st.text(st.characters(), max_size=20)  # all of Unicode, lone surrogates and line separators included
    return replace(
        TURN, text=draw(text), answer=draw(st.none() | text), verdict=draw(st.none() | st.booleans()),
        completion_ids=tuple(completion), behavior_logprobs=tuple(logprobs), seed=draw(st.integers(0, 2**64)),
        reward=draw(st.none() | st.floats(allow_nan=False)), parent=draw(st.none() | text),
        prompt_spans=tuple(draw(st.lists(st.tuples(text, st.integers(1, 9)), max_size=3))),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(turns(), max_size=3), st.integers(0, 9))
def test_any_trace_reads_back_equal_from_one_ascii_line(some_turns, step):
    trace = Trace(task=TASK, turns=tuple(some_turns), step=step)
    line = to_json(trace)
    assert line.isascii() and "\n" not in line
    assert from_json(line) == trace


def test_floats_read_back_to_the_last_bit_and_nan_stays_nan():
    values = (5e-324, -1.7976931348623157e308, 0.1 + 0.2, -math.pi, math.nan, -math.inf)
    turn = replace(TURN, completion_ids=(0,) * len(values), behavior_logprobs=values)
    (back,) = from_json(to_json(replace(TRACE, turns=(turn,)))).turns
    assert list(map(repr, back.behavior_logprobs)) == list(map(repr, values))


def test_writing_twice_appends(tmp_path):
    file = tmp_path / "traces" / "train.jsonl"
    write(file, [TRACE])
    write(file, [replace(TRACE, step=1), replace(TRACE, step=2)])
    assert list(read(file)) == [TRACE, replace(TRACE, step=1), replace(TRACE, step=2)]
    assert count(file) == 3
    assert [trace.step for trace in read(file, wanted={0, 2})] == [0, 2]


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_torn_last_line_is_ignored_with_a_warning_and_removed_by_the_next_append(tmp_path, caplog, cut):
    file = tmp_path / "train.jsonl"
    write(file, [TRACE])
    with file.open("a") as stream:
        stream.write(to_json(TRACE)[:cut])
    with caplog.at_level(logging.WARNING):
        assert list(read(file)) == [TRACE]
    assert f"{file}:2: incomplete last line ignored" in caplog.text
    write(file, [replace(TRACE, step=1)])
    assert [trace.step for trace in read(file)] == [0, 1]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(to_json(TRACE))
    assert list(read(file)) == [TRACE]
    write(file, [replace(TRACE, step=1)])
    assert [trace.step for trace in read(file)] == [0, 1]


def changed(**fields):
    return json.dumps(json.loads(to_json(TRACE)) | fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "Expecting"),
        ("", "Expecting value"),
        ("[]", "list indices"),
        (changed(colour="red"), "Trace got an unexpected keyword argument 'colour'"),
        (changed(task={"id": "q0"}), "Task missing 2 required keyword-only arguments"),
        (changed(turns=[{"prompt_ids": []}]), "no field 'prompt_spans'"),
        (changed(turns=[{"prompt_ids": 3}]), "not iterable"),
        ("{}", "no field 'turns'"),
    ],
)
def test_an_invalid_line_in_the_middle_names_its_place(tmp_path, line, message):
    file = tmp_path / "train.jsonl"
    file.write_text(f"{to_json(TRACE)}\n{line}\n{to_json(TRACE)}\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read(file))
    assert str(caught.value).startswith(f"{file}:2: ")


def test_a_missing_file_is_an_error_before_the_first_trace_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file; expected traces"):
        read(tmp_path / "absent.jsonl")


def test_a_full_disk_is_one_message():
    with pytest.raises(DataError, match=r"cannot append traces: .*earlier are intact"):
        write("/dev/full", [TRACE])
