"""What is seen of a node, so that checks are functions of it alone. Nothing is looked at here: see gather.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mas_hpc.config import RunConfig
from mas_hpc.distributed.device import Offer
from mas_hpc.launch.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What is installed.

    Example: Software(versions={"torch": "2.13.0"}, requirements=("torch>=2.8",), mpi_library="MPICH Version: 5.0.2")
    """

    versions: Mapping[str, str]
    """Of installed distributions, by name."""
    requirements: tuple[str, ...]
    """Of this project, in the words of its metadata; those of extras as well."""
    mpi_library: str = ""
    """As mpi4py's library names itself; empty without one."""
    mpi_problem: str = ""
    """Why mpi4py has no library."""
    mpiexec: str = ""
    """Path of the first in PATH, or else of the one beside this Python; empty without any."""
    mpiexec_version: str = ""
    """In its own words."""
    icpx_version: str = ""
    """Of Intel's compiler in PATH, in its own words; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What torch sees.

    Example: Devices(torch="2.10.0", offer=Offer(devices={"xpu": 12}, backends=("gloo", "xccl")), memory_gib=(63.98,) * 12)
    """

    torch: str
    """Its version."""
    offer: Offer
    memory_gib: tuple[float, ...] = ()
    """Of each accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A folder and the disk below it.

    Example: Room(what="runs_dir", path="/home/me/runs", free_bytes=66 << 30, problem="")
    """

    what: str
    path: str
    """The nearest folder that exists."""
    free_bytes: int
    problem: str = ""
    """Why no file can be written there; empty when one was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The node itself. What the system does not tell is None.

    Example: Host(name="x4117c4s6b0n0", cpus=(1, 2, 3), num_cpus=208, free_memory_bytes=900 << 30, rooms=())
    """

    name: str
    cpus: tuple[int, ...]
    """Logical cores that this process may run on."""
    num_cpus: int
    free_memory_bytes: int | None = None
    """That programs may still take."""
    numa_nodes: int | None = None
    max_open_files: int | None = None
    max_core_bytes: int | None = None
    """Of a file that a crash leaves; -1: any."""
    rooms: tuple[Room, ...] = ()
    temporary: str = "/tmp"
    """Folder of temporary files, as Python picks it."""
    modes: Mapping[str, int] | None = None
    """Permissions of the folders that ssh looks at, by path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """An attempt to listen at an address, and to reach that.

    Example: Reach(what="loopback", address="127.0.0.1:40123", problem="")
    """

    what: str
    address: str
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint of a run folder.

    Example: Saved(name="train_step_20", problems=("it has no completion marker",))
    """

    name: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that checks look at.

    Example: gather(Subject(site=load_site("laptop"), environment={}))
    """

    site: Site
    environment: Mapping[str, str]
    software: Software
    devices: Devices
    host: Host
    num_local_ranks: int = 1
    """That the launcher has started on this node."""
    reaches: tuple[Reach, ...] = ()
    exchange: str | None = None
    """Why two processes of this node cannot exchange over gloo; empty when they have; None: not tried."""
    exchange_s: float = 0.0
    config: RunConfig | None = None
    uncached: Mapping[str, str] | None = None
    """Models of the configuration that are neither folders nor in the hub's cache, by key; None without a configuration."""
    caches: Mapping[str, int] | None = None
    """Files in the folders of caches, by name."""
    run: str = ""
    """Folder of a run, if one is to be looked at."""
    saved: tuple[Saved, ...] = ()
    """Its checkpoints."""

    @property
    def is_cluster(self) -> bool:
        """Whether the site's numbers are of this very kind of node: a laptop's are of some laptop."""
        return self.site.scheduler.kind != "none"
