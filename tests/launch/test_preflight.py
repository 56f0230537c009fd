"""Nodes are checked before ranks start; what is wrong with one is said by name, and costs that node alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mas_hpc.errors import LaunchError
from mas_hpc.launch import preflight as checks
from mas_hpc.launch.evidence import lost_host, named_hosts, silent_host
from mas_hpc.launch.node_check import check_devices, check_scratch
from mas_hpc.launch.preflight import allocated, needed_gib, per_node_words, preflight
from mas_hpc.launch.site import load_site
from tests.launch.stand_in_site import Machine, machine, plan_in

HOSTS = ("localhost", "nodeb", "nodec")
AURORA = [f"x4117c{chassis}s6b0n0.hostmgmt2117.cm.aurora.alcf.anl.gov" for chassis in range(3)]


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    made = machine(tmp_path)
    plan_in(tmp_path).write()
    return made


def bad_nodes(here: Machine) -> dict[str, str]:
    return preflight(plan_in(here.folder), HOSTS, here.environment)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a\na\n", "1 nodes (a ...), expected the 2"), ("a\nb\nc\n", "3 nodes"), ("a\n-oProxyCommand=x\n", "no name of a node")],
)
def test_a_job_with_other_nodes_than_it_asked_for_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "nodes"
    file.write_text(text)
    with pytest.raises(LaunchError) as error:
        allocated(plan_in(tmp_path), {"PBS_NODEFILE": str(file)})
    assert says in str(error.value)


def test_nodes_are_those_of_the_scheduler_each_once(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("a\na\nb\n")
    assert allocated(plan_in(tmp_path), {"PBS_NODEFILE": str(file)}) == ["a", "b"]
    with pytest.raises(LaunchError, match="inside a job"):
        allocated(plan_in(tmp_path), {})


def test_answers_that_the_launcher_has_glued_together_are_two() -> None:
    one, other = '{"node": 2, "name": "vm", "problems": []}', '{"node": 1, "name": "vm", "problems": ["a }"]}'
    assert checks._answers(["noise", f"{one}{other}", "more"]) == [(2, []), (1, ["a }"])]


def test_healthy_nodes_are_left_alone(here: Machine) -> None:
    assert bad_nodes(here) == {}


def test_nodes_that_fail_their_check_or_are_silent_are_named_with_the_reason(here: Machine) -> None:
    here.plant("unstartable", "nodeb")
    here.plant("no_scratch", "nodec")
    found = bad_nodes(here)
    assert found.keys() == {"nodeb", "nodec"}
    assert found["nodeb"] == "the check did not start, or did not end"
    assert found["nodec"].endswith("/gone: No such file or directory")


def test_a_node_that_does_not_answer_in_time_is_silent(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "TIME_LIMIT_S", 8.0)
    here.plant("stuck", "nodeb")
    assert bad_nodes(here).keys() == {"nodeb"}


LINGERS = """#!/bin/bash
echo '{"node": 0, "name": "localhost", "problems": []}'
sleep 40 & echo $! > {folder}/child
setsid sleep 40 & echo $! > {folder}/escaped
wait
"""


def test_the_time_limit_is_one_whatever_the_launcher_has_started(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of a launcher hold its pipe: one in its group is ended, one that has left it is not waited for."""
    monkeypatch.setattr(checks, "TIME_LIMIT_S", 1.0)
    monkeypatch.setattr(checks, "END_S", 0.5)
    launcher = here.folder / "bin/mpiexec"
    launcher.parent.mkdir()
    launcher.write_text(LINGERS.replace("{folder}", str(here.folder)))
    launcher.chmod(0o755)
    start_s = time.monotonic()
    environment = {**here.environment, "PATH": f"{launcher.parent}:/usr/bin:/bin"}
    monkeypatch.setenv("PATH", environment["PATH"])
    assert preflight(plan_in(here.folder), HOSTS, environment).keys() == {"nodeb", "nodec"}
    assert time.monotonic() - start_s < 10.0
    child, escaped = (int((here.folder / name).read_text()) for name in ("child", "escaped"))
    os.kill(escaped, signal.SIGKILL)
    state = Path(f"/proc/{child}/stat")  # a zombie where nobody collects orphans
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_when_no_node_answers_the_fault_is_in_none_of_them(here: Machine) -> None:
    plan = plan_in(here.folder, python="/gone/bin/python")
    with pytest.raises(LaunchError, match="no node of 3 answers") as error:
        preflight(plan, HOSTS, here.environment)
    assert "/gone/bin/python" in str(error.value)


def test_one_process_a_node_by_each_launcher(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    plan.folder.mkdir(parents=True)
    file = plan.folder / "hosts_checked.txt"
    words = per_node_words(plan, HOSTS, ("true",))
    assert words == ("mpiexec", "-n", "3", "--ppn", "1", "--hostfile", str(file), "--line-buffer", "true")
    assert file.read_text() == "localhost\nnodeb\nnodec\n"
    slurm = plan_in(tmp_path, site=load_site("slurm"))
    assert per_node_words(slurm, HOSTS, ("true",))[-3:] == ("--nodelist=localhost,nodeb,nodec", "--kill-on-bad-exit=0", "true")


def test_a_node_says_what_it_lacks(tmp_path: Path) -> None:
    assert check_scratch(tmp_path, 0.0) == []
    assert "needed" in check_scratch(tmp_path, 1e9)[0]
    assert check_scratch(tmp_path / "none", 0.0) == [f"{tmp_path / 'none'}: No such file or directory"]
    assert check_devices("cpu", 1) == []
    assert check_devices("xpu", 10_000)[0].endswith("expected 10000")


def test_room_is_wanted_for_archives_and_what_is_in_them(tmp_path: Path) -> None:
    archive, model = tmp_path / "env.tar.gz", tmp_path / "model"
    model.mkdir()
    for file, size in ((archive, 1 << 28), (model / "weights", 1 << 29)):
        os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), size)
    staged = [{"source": str(path), "target": f"/tmp/mas_hpc/{path.stem}"} for path in (archive, model)]
    assert needed_gib(plan_in(tmp_path, stage=staged)) == pytest.approx(1.0 + 4 * 0.25 + 0.5)


# ---- names in the words of others


def test_a_dead_shepherd_names_its_node_and_victims_name_none() -> None:
    lines = [
        "x4117c1s6b0n0.hsn.cm.aurora.alcf.anl.gov: rank 17 died from signal 15", "x4117c2s6b0n0: rank 24 died from signal 11",
        "x4117c2s6b0n0: shepherd died from signal 11", "x4117c1s6b0n0: shepherd died from signal 9",
        "other: shepherd died from signal 9",
    ]  # fmt: skip
    assert named_hosts(lines, AURORA) == [AURORA[1]]
    assert named_hosts(["10.0.0.1: shepherd died from signal 9"], ["10.0.0.1", "10.0.0.2"]) == ["10.0.0.1"]


def test_a_lost_peer_names_its_node_unless_the_losses_have_spread() -> None:
    addresses = {"a": "10.0.0.1", "b": "10.0.0.2"}
    lost = "rank 0 of 4 cannot go on: ... (Connection closed by peer [10.0.0.2]:29500)"
    assert lost_host([lost, lost, "timed out"], addresses, addresses.__getitem__) == "b"
    assert lost_host([lost, lost.replace("0.2]", "0.1]")], addresses, addresses.__getitem__) == ""
    assert lost_host([lost], {"a": ""}, lambda name: "10.0.0.9") == ""
    assert lost_host([lost], addresses, lambda name: "10.0.0.2") == "", "two nodes with one address are none"


def test_silence_of_one_node_is_its_fault_and_of_several_nobodys() -> None:
    assert silent_host({2, 3}, lambda rank: "ab"[rank // 2]) == "b"
    assert silent_host({1, 2}, lambda rank: "ab"[rank // 2]) == ""
