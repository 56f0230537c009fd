"""What the environment of each launcher means, and that a mismatch of launcher and MPI is an error that says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mas_hpc.distributed.launchers import Place, find_place
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
    "a batch script of SLURM is no rank": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
    "nothing": ({}, None),
    "torchrun before everything": (
        {**TORCHRUN, **PALS, **OPEN_MPI, **HYDRA, **SLURM},
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
        for name in variables:
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
