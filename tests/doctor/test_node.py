"""The real command on this machine: silent when all is well, and faults planted for real are found."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from mas_hpc.cli import app
from mas_hpc.config_file import load_config
from mas_hpc.distributed.checkpoint_files import MARKER
from mas_hpc.doctor.exchange import Exchange
from mas_hpc.doctor.gather import Subject
from mas_hpc.doctor.node import examine
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.launch.finding import Finding
from mas_hpc.launch.site import FOLDER, load_site
from tests.distributed.launch import MPIEXEC, ROOT, environment
from tests.phases.resuming import train

CPU_S = 20.0
"""What the command may take, of this machine's cores together."""
PATH = os.pathsep.join([str(MPIEXEC.parent), "/usr/bin", "/bin"])


def doctor(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in environment(variables).items() if value}
    return subprocess.run(
        [sys.executable, "-m", "mas_hpc", "doctor", *words], capture_output=True, text=True, check=False, timeout=200,
        env=own, cwd=ROOT,
    )  # fmt: skip


def errors(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.verdict == "error"}


def look(site: str = "laptop", *, path: str = PATH, **variables: str) -> dict[str, Finding]:
    """Errors of this node, in this process, with nothing in the environment but these."""
    subject = Subject(site=load_site(site), environment={"PATH": path, **variables}, tries_exchange=False)
    return errors(examine(subject))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def other_mpiexec(tmp_path: Path) -> Path:
    """A folder with the mpiexec of another vendor."""
    program = tmp_path / "bin" / "mpiexec"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'mpiexec (OpenRTE) 4.1.6'\n")
    program.chmod(0o755)
    return program.parent


@pytest.fixture
def bad_site(tmp_path: Path) -> Path:
    """Aurora's, without what this machine lacks, and with a core of the system in the bind list."""
    yaml = YAML()
    site = yaml.load((FOLDER / "aurora" / "site.yaml").read_text(encoding="utf-8"))
    site["bindings"][0]["cores"][0] = "0-3"
    site["scheduler"] = {"kind": "none"}
    site["modules"] = []
    site["host_suffix"] = ""
    file = tmp_path / "site.yaml"
    with file.open("w", encoding="utf-8") as stream:
        yaml.dump(site, stream)
    return file


@pytest.mark.slow
def test_this_machine_is_healthy_and_that_is_soon_known() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = doctor("--json", "--config", "configs/quickstart.yaml", OMP_NUM_THREADS="", PATH=PATH)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"] in ("ok", "warning")
    verdicts = {finding["name"]: finding["verdict"] for finding in told["findings"]}
    assert (verdicts["gloo"], verdicts["ports"], verdicts["MPI"], verdicts["versions"]) == ("ok", "ok", "ok", "ok")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_S


@pytest.mark.slow
def test_faults_of_every_kind_at_once_are_all_found(
    tmp_path: Path, taken_port: int, other_mpiexec: Path, bad_site: Path
) -> None:
    (tmp_path / "run" / "checkpoints" / "train_step_2").mkdir(parents=True)
    done = doctor(
        "--json", "--site", str(bad_site), "--run", str(tmp_path / "run"), MASTER_PORT=str(taken_port),
        PATH=f"{other_mpiexec}{os.pathsep}{PATH}", http_proxy="http://proxy.example:3128", TMPDIR=str(tmp_path / ("x" * 80)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    wrong = {finding["name"] for finding in json.loads(done.stdout)["findings"] if finding["verdict"] == "error"}
    assert wrong == {"MPI", "ports", "proxy", "bind lists", "checkpoints", "TMPDIR"}


def test_an_mpiexec_of_another_vendor_is_found_in_path(other_mpiexec: Path) -> None:
    [finding] = look(path=f"{other_mpiexec}{os.pathsep}{PATH}").values()
    assert finding.name == "MPI" and f"{other_mpiexec}/mpiexec is Open MPI" in finding.evidence


def test_a_port_that_is_taken_is_found(taken_port: int) -> None:
    [finding] = look(MASTER_PORT=str(taken_port)).values()
    assert finding.name == "ports" and f"MASTER_PORT 127.0.0.1:{taken_port}: nobody can listen there" in finding.evidence


def test_a_name_of_the_fast_network_that_nobody_knows_is_found(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    text = (FOLDER / "laptop" / "site.yaml").read_text(encoding="utf-8").replace("kind: none", "kind: slurm")
    file.write_text(f"{text}host_suffix: .hsn.invalid\n", encoding="utf-8")
    found = look(str(file))
    assert ".hsn.invalid:" in found["ports"].evidence and "nobody reaches it" in found["ports"].evidence


def test_a_proxy_is_found_unless_localhost_is_excepted() -> None:
    assert set(look(https_proxy="http://proxy.example:3128")) == {"proxy"}
    assert look(https_proxy="http://proxy.example:3128", no_proxy="localhost,127.0.0.1") == {}
    assert look(https_proxy="http://proxy.example:3128", no_proxy="*") == {}


def test_a_reserved_core_in_the_bind_list_of_a_file_is_found(bad_site: Path) -> None:
    assert look(str(bad_site))["bind lists"].evidence == "12 ranks: core 0 reserved"


def test_a_model_that_is_not_here_is_found_when_offline() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["model.path=nobody/no-such-model"])
    subject = Subject(
        site=load_site("laptop"), environment={"PATH": PATH, "HF_HUB_OFFLINE": "1"}, config=config, tries_exchange=False
    )
    assert "model.path=nobody/no-such-model: not on this machine" in errors(examine(subject))["models"].evidence


@pytest.mark.slow
def test_a_marker_that_is_missing_and_a_file_that_is_cut_are_found(tmp_path: Path) -> None:
    train(tmp_path, "sft", stop=("train", 1))
    run = tmp_path / "sft"
    subject = Subject(site=load_site("laptop"), environment={"PATH": PATH}, run=run, tries_exchange=False)
    assert errors(examine(subject)) == {}
    [checkpoint] = (run / "checkpoints").iterdir()
    [weights] = checkpoint.glob("*.safetensors")
    size = weights.stat().st_size
    os.truncate(weights, size - 1)
    assert f"{weights.name} has {size - 1} bytes of {size}" in errors(examine(subject))["checkpoints"].evidence
    (checkpoint / MARKER).unlink()
    assert errors(examine(subject))["checkpoints"].evidence == f"{checkpoint.name}: no whole {MARKER}"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root mounts a disk of its own")
def test_a_disk_with_little_room_is_found(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        config = load_config(ROOT / "configs" / "quickstart.yaml", [f"runs_dir={disk / 'runs'}"])
        subject = Subject(site=load_site("laptop"), environment={"PATH": PATH}, config=config, tries_exchange=False)
        [finding] = errors(examine(subject)).values()
        assert finding.evidence == f"runs_dir {disk}: 0.00 GiB free"
        (disk / "full").write_bytes(b"\0" * ((1 << 20) - 4096))
        (disk / "fuller").write_bytes(b"\0" * 4096)
        [finding] = errors(examine(subject)).values()
        assert finding.evidence == f"runs_dir {disk}: No space left on device"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_exchange_that_does_not_end_is_ended_and_said() -> None:
    problem, seconds = Exchange(environment()).result(timeout_s=0.2)
    assert problem == "rank 0 has not ended within 0.2 s; rank 1 has not ended within 0.2 s"
    assert seconds < 5.0


@pytest.mark.slow
def test_an_exchange_leaves_the_store_of_a_launcher_alone() -> None:
    problem, _ = Exchange(environment({"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": "1"})).result()
    assert problem == ""


@pytest.mark.slow
def test_an_exchange_over_an_interface_that_is_not_there_says_why() -> None:
    problem, _ = Exchange(environment({"GLOO_SOCKET_IFNAME": "nosuch0"})).result()
    assert problem.startswith("rank 0: ") and "nosuch0" in problem


def test_a_run_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    subject = Subject(site=load_site("laptop"), environment={"PATH": PATH}, run=tmp_path / "none", tries_exchange=False)
    with pytest.raises(ConfigError, match="no such folder; expected that of a run"):
        examine(subject)


@pytest.mark.parametrize(("words", "variables", "match"), [
    (["doctor"], {"PMI_RANK": "0", "PMI_SIZE": "2"}, "rank 0 of 2, started by MPICH or Intel MPI: add --mpi"),
    (["doctor", "--mpi"], {}, "expected at least 2 ranks; start it as mpiexec -n 2"),
])  # fmt: skip
def test_ranks_and_single_processes_are_not_mistaken_for_each_other(
    words: list[str], variables: dict[str, str], match: str
) -> None:
    done = CliRunner().invoke(app, words, env=variables)
    assert isinstance(done.exception, LaunchError) and match in str(done.exception)
