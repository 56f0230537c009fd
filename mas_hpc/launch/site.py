"""A site: its hardware, queues, launcher, bind lists and environments, read from launch/<site>/site.yaml."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mas_hpc.errors import ConfigError

FOLDER = Path(__file__).parent
Role = Literal["trainer", "native", "vllm"]
"""What a rank's process is for: training, the native engine, or vLLM's engine."""
Level = Literal["card", "node", "rack", "machine"]
"""How far apart two tiles are: on one card, in one node, in one dragonfly group, anywhere."""
LEVELS: tuple[Level, ...] = ("card", "node", "rack", "machine")
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Of an environment variable."""


class Record(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tile(Record):
    """What one rank computes with: half a card on Aurora, a core on a laptop."""

    device: Literal["xpu", "cuda", "cpu"]
    memory_gib: Amount
    peak_tflops: Amount
    """Of the type that models are trained in, as published efficiencies use it."""
    gemm_tflops: Amount
    """Measured with all tiles of a node at work."""
    memory_gb_per_s: Amount
    host_gb_per_s: Amount
    """To and from the host's memory, with all tiles at work."""


class Link(Record):
    """Alpha and beta of what joins two tiles."""

    latency_us: Amount
    gb_per_s: Amount
    """Of one tile, one direction, while the others of its node send too."""


class Node(Record):
    """Hardware of a node."""

    tiles: Count
    tiles_per_card: Count
    sockets: Count
    cores_per_socket: Count
    """Physical; socket s owns s * cores_per_socket and those after it, its share of the tiles, and of the NICs."""
    threads_per_core: Count
    memory_gib: Amount
    """That a user may take."""
    nics: Annotated[int, Field(ge=0)]
    nics_by_core: bool = False
    """Whether a process takes the network card that its first core leads to: see nic_of_core."""
    reserved_cores: tuple[int, ...] = ()
    """Of the system; a rank bound there fights with it."""
    service_cores: tuple[int, ...] = ()
    """Of services that a job may start, such as Copper; ranks had better leave them."""
    numa_nodes: Count
    scratch: str
    """Folder on the node itself."""

    @property
    def num_cores(self) -> int:
        """Physical ones."""
        return self.sockets * self.cores_per_socket

    def nic_of_core(self, core: int) -> int:
        """The network card that a process on this core takes: those of its socket in turn."""
        per_socket = self.nics // self.sockets
        return self.socket_of_core(core) * per_socket + core % self.num_cores % per_socket

    def socket_of_core(self, core: int) -> int:
        """Logical core i + num_cores shares the core i."""
        return core % self.num_cores // self.cores_per_socket

    def socket_of_tile(self, tile: int) -> int:
        """Tiles are spread evenly, in order."""
        return tile * self.sockets // self.tiles


class Limit(Record):
    """What a queue lets a job of so many nodes have."""

    min_nodes: Count
    max_nodes: Count
    max_walltime_min: Count


class Queue(Record):
    """Of a scheduler."""

    name: str
    limits: tuple[Limit, ...]
    """By number of nodes; a job that none of them takes is refused."""
    min_walltime_min: Count = 5
    max_running: Annotated[int, Field(ge=0)] = 0
    """Of one user at once; 0: not limited here."""
    max_queued: Annotated[int, Field(ge=0)] = 0
    """Of one user, running ones included; 0: not limited here."""

    def limit(self, nodes: int) -> Limit | None:
        """The one for so many nodes."""
        return next((limit for limit in self.limits if limit.min_nodes <= nodes <= limit.max_nodes), None)


class Scheduler(Record):
    """Who gives nodes."""

    kind: Literal["pbs", "slurm", "none"]
    queues: tuple[Queue, ...] = ()
    filesystems: tuple[str, ...] = ()
    """That a job may name; empty: a job names none."""
    default_filesystems: tuple[str, ...] = ()
    mounts: dict[str, str] = {}
    """File systems, as a job names them, by the folder that their files are below."""
    submit_from: tuple[str, ...] = ()
    """Folders that a job may be submitted from, and below; empty: any."""

    def queue(self, name: str) -> Queue:
        """Raises ConfigError naming those that there are."""
        for queue in self.queues:
            if queue.name == name:
                return queue
        raise ConfigError(f"queue {name!r}: expected one of {[queue.name for queue in self.queues]}")


class Binding(Record):
    """Cores of each rank of a node, in order of local ranks."""

    ranks_per_node: Count
    cores: tuple[str, ...]
    """One list a rank, such as 1-8 or 1-8,105-112."""
    worker_cores: tuple[int, ...] = ()
    """Of the communication library's threads, one a rank; empty: it chooses."""

    @field_validator("cores")
    @classmethod
    def _lists(cls, lists: tuple[str, ...]) -> tuple[str, ...]:
        for text in lists:
            parse_cores(text)
        return lists

    @model_validator(mode="after")
    def _one_a_rank(self) -> Binding:
        if len(self.cores) != self.ranks_per_node:
            raise ValueError(f"{len(self.cores)} lists of cores for ranks_per_node={self.ranks_per_node}; expected one a rank")
        if self.worker_cores and len(self.worker_cores) != self.ranks_per_node:
            raise ValueError(
                f"{len(self.worker_cores)} worker_cores for ranks_per_node={self.ranks_per_node}; expected one a rank"
            )
        return self


class Profile(Record):
    """The environment of a role's processes."""

    set: dict[Name, str] = {}
    unset: tuple[Name, ...] = ()


class MpiLauncher(Record):
    """Who starts ranks on the nodes."""

    kind: Literal["pals", "srun", "mpiexec", "torchrun"]
    options: tuple[str, ...] = ()
    """Given always."""
    mpi: str = ""
    """Part of the name that mpi4py's library has to have, such as MPICH; empty: any."""


class Site(Record):
    """All that is known of a machine.

    Example: load_site("aurora").node.tiles == 12
    """

    name: str
    num_nodes: Count
    nodes_per_rack: Count
    host_suffix: str = ""
    """That a node's name needs in the address of rank 0, for the fast network."""
    tile: Tile
    node: Node
    links: dict[Level, Link]
    storage_gb_per_s: Amount
    """Peak of the file system that checkpoints go to, of the whole machine."""
    hours_between_failures: Amount
    """Of one node."""
    scheduler: Scheduler
    launcher: MpiLauncher
    bindings: tuple[Binding, ...] = ()
    modules: tuple[str, ...] = ()
    common: Profile = Profile()
    """Environment of every role."""
    profiles: dict[Role, Profile] = {}
    proxy: str = ""
    no_proxy: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _all_levels(self) -> Site:
        if missing := [level for level in LEVELS if level not in self.links]:
            raise ValueError(f"links: no {', '.join(missing)}; expected {', '.join(LEVELS)}")
        return self

    @cached_property
    def folder(self) -> Path:
        """Where its templates are."""
        return FOLDER / self.name

    def binding(self, ranks_per_node: int) -> Binding:
        """Raises ConfigError naming those that there are."""
        for binding in self.bindings:
            if binding.ranks_per_node == ranks_per_node:
                return binding
        raise ConfigError(
            f"site {self.name}: no bind list for {ranks_per_node} ranks a node; expected one of "
            f"{[binding.ranks_per_node for binding in self.bindings]}, or a new one in {self.folder / 'site.yaml'}"
        )

    def started_by(self, starter: Literal["torchrun", "mpiexec"]) -> Site:
        """The same, where ranks of one host are started by torchrun or mpiexec; a site with a launcher of its own keeps it."""
        if self.launcher.kind not in ("torchrun", "mpiexec"):
            return self
        return self.model_copy(update={"launcher": self.launcher.model_copy(update={"kind": starter})})

    def environment(self, role: Role) -> Profile:
        """Common settings and those of the role, which win."""
        own = self.profiles.get(role, Profile())
        unset = tuple(dict.fromkeys((*self.common.unset, *own.unset)))
        settings = {**self.common.set, **own.set}
        return Profile(set={name: value for name, value in settings.items() if name not in own.unset}, unset=unset)


def load_site(name: str) -> Site:
    """A site that is shipped, or the site.yaml at a path. Raises ConfigError naming key, value and remedy."""
    file = Path(name) if name.endswith(".yaml") else FOLDER / name / "site.yaml"
    if not file.is_file():
        known = sorted(folder.parent.name for folder in FOLDER.glob("*/site.yaml"))
        raise ConfigError(f"site {name!r}: expected one of {known}, or the path of a site.yaml")
    try:
        raw = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected the keys of a site, as {FOLDER / 'slurm/site.yaml'} has them")
        return Site.model_validate(raw)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        lines = [f"{file}: {'.'.join(str(part) for part in e['loc']) or 'site'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def parse_cores(text: str) -> tuple[int, ...]:
    """1-3,105 is (1, 2, 3, 105). Raises ValueError for anything else, and for a core named twice."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"cores {text!r}: expected numbers and ranges such as 1-8,105-112")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"cores {text!r}: a core is named twice")
    return tuple(found)
