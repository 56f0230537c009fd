"""The stand-ins refuse what the real programs refuse; otherwise a job that runs here would prove little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mas_hpc.launch.plan import mpiexec_words
from mas_hpc.launch.render import render
from tests.launch.stand_in_site import STAND_INS, Machine, machine, plan_in

SHOW = "import os; print(sorted(name for name in os.environ if name.startswith('PALS_')), os.environ['PALS_RANKID'])"


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    (tmp_path / "hosts").write_text("localhost\nnodeb\n")
    return machine(tmp_path)


def run(here: Machine, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = STAND_INS / words[0]
    return subprocess.run(
        [str(path), *words[1:]], env={**here.environment, **variables}, cwd=here.folder, capture_output=True, text=True,
        check=False, timeout=100,
    )  # fmt: skip


def mpiexec(here: Machine, *options: str, n: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    given = ("-n", str(n), "--ppn", "1", "--hostfile", "hosts", *options, sys.executable, "-c", SHOW)
    return run(here, "mpiexec", *given, **variables)


def test_ranks_get_what_pals_tells_them_and_no_size_of_the_world(here: Machine) -> None:
    done = mpiexec(here, "--cpu-bind", "list:4-5", "--line-buffer")
    assert done.returncode == 0, done.stderr
    told = "['PALS_LOCAL_RANKID', 'PALS_LOCAL_SIZE', 'PALS_RANKID']"
    assert sorted(done.stdout.splitlines()) == [f"{told} 0", f"{told} 1"]
    assert "PALS_WORLD_SIZE" in mpiexec(here, "--env", "PALS_WORLD_SIZE=2").stdout


@pytest.mark.parametrize(
    ("options", "n", "says"),
    [
        (("--gpu-bind", "list:0.0:0.1"), 2, "Failed to parse implicit GPU selection"),
        ((), 3, "-n 3 is not --ppn 1 on each of 2 hosts"),
        (("--cpu-bind", "list:1:2"), 2, "2 lists for --ppn 1"),
        (("--cpu-bind", "list:1-3,2"), 2, "names a core twice"),
        (("--cpu-bind", "depth"), 2, "depth"),
        (("--nonsense",), 2, "no such option"),
    ],
)
def test_mpiexec_refuses(here: Machine, options: tuple[str, ...], n: int, says: str) -> None:
    done = mpiexec(here, *options, n=n, ZE_FLAT_DEVICE_HIERARCHY="FLAT")
    assert done.returncode == 1 and says in done.stderr


def test_the_code_of_ranks_is_that_of_pals(here: Machine) -> None:
    given = ("mpiexec", "-n", "2", "--ppn", "1", "--hostfile", "hosts")
    assert run(here, *given, sys.executable, "-c", "import sys; sys.exit(85)").returncode == 85
    killed = run(here, *given, sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    assert killed.returncode == 137 and "died from signal 9" in killed.stderr


@pytest.mark.parametrize("missing", ["-A ", "-l walltime=", "-l filesystems=", "-l select=", "#!/bin/bash -l"])
def test_qsub_refuses_a_script_without(here: Machine, missing: str) -> None:
    plan = plan_in(here.folder, queue="debug", project="P", filesystems=("home",))
    text = render(plan)
    assert missing in text
    (here.folder / "job.sh").write_text("\n".join(line for line in text.splitlines() if missing not in line))
    done = run(here, "qsub", "job.sh")
    assert done.returncode == 2 and not list(here.home.glob("*.job"))


def test_qsub_refuses_the_whole_environment(here: Machine) -> None:
    (here.folder / "job.sh").write_text(render(plan_in(here.folder, queue="debug", project="P", filesystems=("home",))))
    assert "-V is refused" in run(here, "qsub", "-V", "job.sh").stderr


def test_the_command_of_a_plan_is_taken(here: Machine) -> None:
    plan = plan_in(here.folder)
    plan.folder.mkdir(parents=True)
    plan.hostfile(0).write_text("localhost\nnodeb\n")
    words = mpiexec_words(plan, ["localhost", "nodeb"], "localhost", 1, 0)
    at = words.index(sys.executable)
    done = run(here, *words[:at], sys.executable, "-c", SHOW)
    assert done.returncode == 0 and done.stdout.count("PALS_WORLD_SIZE") == 2


def test_ssh_does_not_ask_and_says_who_does_not_answer(here: Machine) -> None:
    here.plant("no_ssh", "nodec")
    assert "password" in run(here, "ssh", "nodeb", "true").stderr
    dead = run(here, "ssh", "-o", "BatchMode=yes", "nodec", "true")
    assert (dead.returncode, dead.stderr.strip()) == (255, "ssh: connect to host nodec port 22: Connection timed out")
    said = run(here, "ssh", "-x", "-o", "BatchMode=yes", "nodeb", f"echo {here.folder}/scratch/x")
    assert said.stdout.strip() == f"{here.folder}/scratch@nodeb/x"
