"""What the environment of each launcher means, and that a mismatch of launcher and MPI is an error that says so."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from mas_hpc.distributed.launchers import Place, find_place
from mas_hpc.distributed.mpi import fast_name
from mas_hpc.distributed.world import World
from mas_hpc.errors import LaunchError
from tests.distributed.launch import MPIEXEC, environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
PALS = {"PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "PMIX_RANK": "1",
}  # fmt: skip
PMIX = {"PMIX_RANK": "1", "PMIX_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
AURORA = "cm.aurora.alcf.anl.gov"
TABLE = {
    "torchrun": (TORCHRUN, Place(launcher="torchrun", rank=3, size=4, local_rank=1, local_size=2)),
    "PALS tells no size": (PALS, Place(launcher="PALS", rank=13, size=None, local_rank=1, local_size=12)),
    "PALS with the size passed": (
        {**PALS, "PALS_WORLD_SIZE": "24"},
        Place(launcher="PALS", rank=13, size=24, local_rank=1, local_size=12),
    ),
    "Open MPI, which sets PMIX_RANK too": (OPEN_MPI, Place(launcher="Open MPI", rank=1, size=2, local_rank=0, local_size=1)),
    "PMIx alone": (PMIX, Place(launcher="PMIx", rank=1, size=None, local_rank=1, local_size=None)),
    "MPICH": (HYDRA, Place(launcher="MPICH or Intel MPI", rank=1, size=2, local_rank=1, local_size=2)),
    "PMI with other local names": (
        {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "2"},
        Place(launcher="MPICH or Intel MPI", rank=0, size=2, local_rank=0, local_size=2),
    ),
    "srun": (SLURM, Place(launcher="SLURM", rank=2, size=4, local_rank=0, local_size=None)),
    "srun says how its tasks lie on the nodes": (
        {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x2),1,12", "SLURM_NODEID": "1"},
        Place(launcher="SLURM", rank=2, size=4, local_rank=0, local_size=3),
    ),
    "a script that copies the rank of MPI": (
        {**HYDRA, "RANK": "1", "WORLD_SIZE": "2"},
        Place(launcher="torchrun", rank=1, size=2, local_rank=None, local_size=None),
    ),
    "ranks started by hand in a step of one task": (
        {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        Place(launcher="torchrun", rank=1, size=2, local_rank=None, local_size=None),
    ),
    "Open MPI before PALS is no question: PALS starts MPICH": (
        {**PALS, **OPEN_MPI},
        Place(launcher="PALS", rank=13, size=None, local_rank=1, local_size=12),
    ),
    "a batch script of SLURM is no rank": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
    "nothing": ({}, None),
    "torchrun before everything": (
        {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", **PALS, **OPEN_MPI, **HYDRA, **SLURM},
        Place(launcher="torchrun", rank=3, size=4, local_rank=1, local_size=2),
    ),
    "PALS before PMI": (
        {**PALS, "PMI_RANK": "13", "PMI_SIZE": "24"},
        Place(launcher="PALS", rank=13, size=24, local_rank=1, local_size=12),
    ),
    "mpiexec inside a SLURM step": (
        {**HYDRA, **SLURM},
        Place(launcher="MPICH or Intel MPI", rank=1, size=2, local_rank=1, local_size=2),
    ),
}  # fmt: skip


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables, _ in TABLE.values():
        for name in (*variables, "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", TABLE)
def test_each_launcher_is_understood(name: str) -> None:
    variables, place = TABLE[name]
    assert find_place(variables) == place


def test_a_rank_that_is_no_number_or_too_large_is_named() -> None:
    with pytest.raises(LaunchError, match="RANK='one'"):
        find_place({"RANK": "one", "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match=r"RANK=2: expected 0 to 1"):
        find_place({"RANK": "2", "WORLD_SIZE": "2"})


def test_an_exported_rank_that_contradicts_the_launcher_is_refused() -> None:
    stale = {"RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(LaunchError, match=r"RANK=0 of WORLD_SIZE=2, but MPICH or Intel MPI says PMI_RANK=1 of 2; unset RANK"):
        find_place({**stale, **HYDRA})
    with pytest.raises(LaunchError, match=r"but PALS says PALS_RANKID=13 of an unknown number"):
        find_place({**stale, **PALS})
    with pytest.raises(LaunchError, match="two launchers"):
        find_place({**stale, **HYDRA, "PMI_RANK": "0", "PMI_SIZE": "4"})


def test_a_node_beyond_slurms_list_is_named() -> None:
    with pytest.raises(LaunchError, match=r"SLURM_STEP_TASKS_PER_NODE='2': expected the tasks of SLURM_NODEID=1 too"):
        find_place({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "1"})


def test_ranks_of_srun_meet_at_the_master_address_without_mpi(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "2", "MASTER_ADDR": "nid1", "MASTER_PORT": "29500"}
    for name, value in {**SLURM, **variables}.items():
        monkeypatch.setenv(name, value)
    assert World.from_env() == World(rank=2, size=4, local_rank=0, local_size=1, launcher="slurm")


def test_ranks_of_srun_meet_in_the_store_of_their_supervisor() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    code = (
        "from mas_hpc.distributed.world import World, connected\n"
        "from mas_hpc.distributed.exchange import gather_lines\n"
        "with connected(World.from_env()) as world:\n"
        "    print(gather_lines(world, [f'{world.launcher} {world.rank} attempt {world.attempt}']))\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            env=environment() | {
                "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank),
                "MAS_HPC_STORE": f"127.0.0.1:{store.port}", "MAS_HPC_ATTEMPT": "3", "MASTER_ADDR": "127.0.0.1",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said == ["['slurm 0 attempt 3', 'slurm 1 attempt 3']\n"] * 2


@pytest.mark.parametrize(
    ("host", "full", "known", "name"),
    [
        ("x4117c4s6b0n0", f"x4117c4s6b0n0.hostmgmt2117.{AURORA}", "cm.aurora", f"x4117c4s6b0n0.hsn.{AURORA}"),
        ("x4117c4s6b0n0", "x4117c4s6b0n0", "cm.aurora", f"x4117c4s6b0n0.hsn.{AURORA}"),
        ("x1921c0s0b0n0", "x1921c0s0b0n0.hostmgmt7.cm.sunspot.org", "cm.sunspot", "x1921c0s0b0n0.hsn.cm.sunspot.org"),
        ("x4117c4s6b0n0", "x4117c4s6b0n0.elsewhere.org", "nothing", "x4117c4s6b0n0.elsewhere.org"),
        ("laptop", "laptop.home", "laptop", "laptop.home"),
    ],
)  # fmt: skip
def test_a_node_of_aurora_is_named_as_on_its_fast_network(host: str, full: str, known: str, name: str) -> None:
    assert fast_name(host, full, lambda candidate: known in candidate) == name


def test_the_world_of_torchrun_knows_its_attempt(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_env()
    assert world == World(rank=3, size=4, local_rank=1, local_size=2, launcher="torchrun", attempt=2)
    assert world.store is None and not world.is_first


def test_one_process_of_mpiexec_is_a_world_of_one_without_mpi(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.from_env() == World()
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert World.from_env() == World()


JOIN = "from mas_hpc.distributed.world import World; World.from_env()"


def last_line(script: str, variables: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment(variables)
    )
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "told", "seen"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "rank 0 of 2", "rank 0 of 1"),
        ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "12"}, "rank 0 of an unknown number", "rank 0 of 1"),
        ({"PALS_RANKID": "1"}, "rank 1 of an unknown number", "rank 0 of 1"),
        (OPEN_MPI, "rank 1 of 2", "another"),
    ],
)
def test_mpiexec_of_another_mpi_is_an_error_that_names_both(variables: dict[str, str], told: str, seen: str) -> None:
    """Alone in its MPI world, as every rank is whose mpiexec mpi4py's library does not know."""
    message = last_line(JOIN, variables)
    assert "LaunchError" in message and told in message and seen in message
    assert "MPICH" in message and "mas-hpc[mpich]" in message


@pytest.mark.parametrize("hidden", ["mpi4py", "mpi4py.MPI"])
def test_without_mpi4py_or_its_library_the_extra_is_named(hidden: str) -> None:
    message = last_line(f"import sys; sys.modules[{hidden!r}] = None; {JOIN}", {"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert "LaunchError" in message and "mas-hpc[mpich]" in message


def test_mpiexec_is_beside_this_python() -> None:
    assert MPIEXEC.is_file()
