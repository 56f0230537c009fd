"""What launchers say in a rank's environment. Pure: the environment is passed in, and nothing is asked of MPI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mas_hpc.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's place as its launcher tells it; None where it does not tell.

    Example: Place(launcher="MPICH or Intel MPI", rank=1, size=2, local_rank=1, local_size=2)
    """

    launcher: str
    rank: int
    size: int | None = None
    local_rank: int | None = None
    local_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The variables of one launcher, alternatives in order. It is there when all of `present` are set.

    Example: Launcher(name="x", present=("X_RANK",), rank=("X_RANK",))
    """

    name: str
    present: tuple[str, ...]
    rank: tuple[str, ...]
    size: tuple[str, ...] = ()
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()


TORCHRUN = Launcher(
    name="torchrun",
    present=("RANK", "WORLD_SIZE"),
    rank=("RANK",),
    size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    local_size=("LOCAL_WORLD_SIZE",),
)
# The first that is there counts. Whoever sets RANK and WORLD_SIZE means it,
# also inside an MPI job, as a supervisor on each node does.
# PALS sets the PMI variables as well; Open MPI 5 sets PMIX_RANK as well, but only its own variables tell the size.
# SLURM_NTASKS is also set in a batch script, which is one process: SLURM_STEP_NUM_TASKS is of srun's ranks alone.
LAUNCHERS = (
    TORCHRUN,
    Launcher(
        name="PALS",
        present=("PALS_RANKID",),
        rank=("PALS_RANKID",),
        size=("PALS_WORLD_SIZE", "PMI_SIZE"),
        local_rank=("PALS_LOCAL_RANKID",),
        local_size=("PALS_LOCAL_SIZE",),
    ),
    Launcher(
        name="Open MPI",
        present=("OMPI_COMM_WORLD_SIZE",),
        rank=("OMPI_COMM_WORLD_RANK",),
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(name="PMIx", present=("PMIX_RANK",), rank=("PMIX_RANK",), local_rank=("PMIX_LOCAL_RANK",)),
    Launcher(
        name="MPICH or Intel MPI",
        present=("PMI_SIZE",),
        rank=("PMI_RANK",),
        size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "I_MPI_LOCAL_RANK"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "I_MPI_LOCAL_SIZE"),
    ),
    Launcher(
        name="SLURM",
        present=("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        rank=("SLURM_PROCID",),
        size=("SLURM_STEP_NUM_TASKS",),
        local_rank=("SLURM_LOCALID",),
    ),
)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This rank's place by the first of LAUNCHERS that is there; None without a launcher.

    Raises LaunchError when a variable is not a number, or the rank is not below the size.
    """
    for launcher in LAUNCHERS:
        if all(name in environment for name in launcher.present):
            break
    else:
        return None
    place = Place(
        launcher=launcher.name,
        rank=_first(environment, launcher.rank) or 0,
        size=_first(environment, launcher.size),
        local_rank=_first(environment, launcher.local_rank),
        local_size=_first(environment, launcher.local_size),
    )
    if place.size is not None and not 0 <= place.rank < place.size:
        raise LaunchError(
            f"{launcher.rank[0]}={place.rank}: expected 0 to {place.size - 1}, as {launcher.name} has {place.size} ranks"
        )
    return place


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if name in environment:
            return number(environment, name)
    return None


def number(environment: Mapping[str, str], name: str) -> int:
    """An integer that a launcher must have set."""
    text = environment.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r}: expected a number; start with torchrun or mpiexec, which set it") from None
