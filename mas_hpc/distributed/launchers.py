"""What launchers say in a rank's environment. Pure: the environment is passed in, and nothing is asked of MPI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mas_hpc.errors import LaunchError

ATTEMPT, STORE = "MAS_HPC_ATTEMPT", "MAS_HPC_STORE"
"""What a supervisor tells the ranks of a launcher that has no variables for it: World.attempt, and host:port of its store."""
LOGS = "MAS_HPC_LOGS"
"""Folder of a file for each rank's output; ranks that are not told it write to whoever started them."""


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

    @property
    def variables(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.present, *self.rank, *self.size, *self.local_rank, *self.local_size)


TORCHRUN = Launcher(
    name="torchrun",
    present=("RANK", "WORLD_SIZE"),
    rank=("RANK",),
    size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    local_size=("LOCAL_WORLD_SIZE",),
)
ELASTIC = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")
"""What torchrun, or a supervisor, sets beside RANK; without any of them RANK is a script's, or left over in a shell."""
SLURM = Launcher(
    name="SLURM",
    present=("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    rank=("SLURM_PROCID",),
    size=("SLURM_STEP_NUM_TASKS",),
    local_rank=("SLURM_LOCALID",),
)
# The first that is there counts. Whoever sets RANK and WORLD_SIZE means it, also inside an MPI job or a SLURM step, as a
# torchrun or a supervisor on each node does.
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
    SLURM,
)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This rank's place by the first of LAUNCHERS that is there; None without a launcher.

    Raises LaunchError when a variable is not a number, the rank is not below the size, or RANK and WORLD_SIZE, of no torchrun,
    contradict the launcher that did start this process.
    """
    found = [launcher for launcher in LAUNCHERS if all(name in environment for name in launcher.present)]
    if not found:
        return None
    place = _place(environment, found[0])
    if found[0] is TORCHRUN and found[1:] and not any(name in environment for name in ELASTIC):
        _check_same(place, _place(environment, found[1]), found[1])
    return place


def _check_same(told: Place, started: Place, launcher: Launcher) -> None:
    """RANK and WORLD_SIZE that a shell exported would make every rank of an MPI job the same one."""
    if started.size != 1 and (told.rank != started.rank or started.size not in (None, told.size)):
        raise LaunchError(
            f"two launchers: RANK={told.rank} of WORLD_SIZE={told.size}, but {launcher.name} says {launcher.rank[0]}="
            f"{started.rank} of {started.size if started.size is not None else 'an unknown number'}; unset RANK and "
            "WORLD_SIZE, or start ranks inside with torchrun"
        )


def _place(environment: Mapping[str, str], launcher: Launcher) -> Place:
    place = Place(
        launcher=launcher.name,
        rank=_first(environment, launcher.rank) or 0,
        size=_first(environment, launcher.size),
        local_rank=_first(environment, launcher.local_rank),
        local_size=_slurm_local_size(environment) if launcher is SLURM else _first(environment, launcher.local_size),
    )
    if place.size is not None and not 0 <= place.rank < place.size:
        raise LaunchError(
            f"{launcher.rank[0]}={place.rank}: expected 0 to {place.size - 1}, as {launcher.name} has {place.size} ranks"
        )
    return place


def _slurm_local_size(environment: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node, from a list such as 2(x3),1: two on each of the first three nodes, one on the fourth."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None or "SLURM_NODEID" not in environment:
        return None
    counts: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeats or 1)
    node = number(environment, "SLURM_NODEID")
    if not 0 <= node < len(counts):
        raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: expected the tasks of SLURM_NODEID={node} too")
    return counts[node]


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
