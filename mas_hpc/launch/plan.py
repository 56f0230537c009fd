"""What a job is, once everything is decided: job.json beside the run, and the exact command that starts its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from mas_hpc.distributed.launchers import ATTEMPT, STORE
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.launch.site import Count, Profile, Record, Role, Site, parse_cores

Job = Literal["pipeline", "rollout", "train", "evaluate"]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}$")]
"""Of a scheduler's vocabulary: what could be an option, a path or several words is refused."""
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00\r\n]*$")]
Override = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*=[^\x00\r\n]*$")]
ARCHIVES = (".tar", ".tar.gz", ".tgz")
"""Endings of what is unpacked on each node, and has bin/python inside."""


class Group(Record):
    """Nodes whose ranks do the same.

    Example: Group(role="trainer", nodes=256, ranks_per_node=12, cores=("4-7", ...), environment=profile)
    """

    role: Role
    nodes: Count
    ranks_per_node: Count
    cores: tuple[str, ...] = ()
    """Of each local rank, as site.Binding has them; empty: ranks are not bound."""
    environment: Profile = Profile()
    """What this role has beside the site's common environment, which the job's script exports for all."""

    @property
    def ranks(self) -> int:
        """Of all its nodes."""
        return self.nodes * self.ranks_per_node


class Staged(Record):
    """What every node gets a copy of before ranks start.

    Example: Staged(source="/flare/p/env.tar.gz", target="/tmp/mas_hpc/env")
    """

    source: AbsolutePath
    target: AbsolutePath
    """Folder on the node; an archive is unpacked into it."""

    @property
    def is_environment(self) -> bool:
        """Whether it is an archive with an interpreter."""
        return self.source.endswith(ARCHIVES)


class JobPlan(Record):
    """A job, self-contained: one that waited for days in a queue runs as it was checked, whatever its site file says then.

    Example: JobPlan.read(Path("runs/mas.job/job.json")).num_ranks
    """

    name: Word
    site: Site
    job: Job
    config: AbsolutePath
    overrides: tuple[Override, ...] = ()
    """The user's; those of name and runs_dir are given by run_dir."""
    run_dir: AbsolutePath
    """The run's folder, which the ranks make: runs_dir/name."""
    cwd: AbsolutePath
    """Folder that the job was asked for in, and that it runs in: what relative paths of the configuration are relative to."""
    nodes: Count
    """Asked for, spares included."""
    spares: Annotated[int, Field(ge=0)] = 0
    ranks_per_node: Count
    tensor_parallel: Count = 1
    """Neighbouring ranks that train each layer together."""
    walltime_min: Annotated[int, Field(ge=0)]
    """0 where there is no scheduler."""
    queue: Word | Literal[""] = ""
    project: Word | Literal[""] = ""
    filesystems: tuple[Word, ...] = ()
    groups: tuple[Group, ...]
    """In the order of ranks and of hosts."""
    python: AbsolutePath
    """Interpreter that supervises the job; that of the ranks is rank_python."""
    stage: tuple[Staged, ...] = ()
    stage_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    """Share of the nodes below which failures to stage are no fault of nodes, unless those that are left are enough."""
    chain: Annotated[int, Field(ge=0)] = 0
    """Jobs that follow, each after the one before has ended in any way, and go on with its run."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    signal_s: Annotated[int, Field(ge=0)] = 600
    """Seconds before the end of the walltime at which a checkpoint is asked for."""

    @property
    def folder(self) -> Path:
        """The job's own, beside the run's: job.json, script, host files, what the scheduler writes."""
        return Path(f"{self.run_dir}.job")

    @property
    def num_ranks(self) -> int:
        """Of all groups."""
        return sum(group.ranks for group in self.groups)

    @property
    def num_active(self) -> int:
        """Nodes with ranks: without spares."""
        return sum(group.nodes for group in self.groups)

    @property
    def rank_python(self) -> str:
        """Interpreter of the ranks: the staged environment's, where there is one."""
        staged = [item.target for item in self.stage if item.is_environment]
        return f"{staged[0]}/bin/python" if staged else self.python

    def hostfile(self, attempt: int) -> Path:
        """Where the hosts of an attempt are written, one a line, before mpiexec reads it."""
        return self.folder / f"hosts_{attempt}.txt"

    def write(self) -> Path:
        """Make the job's folder with job.json in it. Raises ConfigError when a job has it whose run has not begun."""
        try:
            self.folder.mkdir(parents=True, exist_ok=Path(self.run_dir).exists())  # a run that goes on
        except FileExistsError:
            raise ConfigError(f"{self.folder}: a job of this name is there; give the run another name=...") from None
        file = self.folder / "job.json"
        file.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return file

    @staticmethod
    def read(file: Path) -> JobPlan:
        """Raises ConfigError for what is no job.json."""
        try:
            return JobPlan.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{file}: not the job.json of mas-hpc launch ({' '.join(str(error).split())})") from None


def mpiexec_words(
    plan: JobPlan, hosts: Sequence[str], master_addr: str, master_port: int, attempt: int, *, resume: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """The command that starts the ranks of an attempt on `hosts`, one name a node, as a list of words: never a string.

    The supervisor's store is at master_addr:master_port; an empty master_addr leaves it out, and ranks meet by themselves.
    With `resume` they go on in plan.run_dir. Raises LaunchError for another number of hosts than the groups have, and for what
    the site's launcher cannot start.
    """
    if len(hosts) != plan.num_active:
        raise LaunchError(f"{plan.name}: {len(hosts)} hosts for {plan.num_active} nodes of ranks; expected as many")
    meeting = {}
    if master_addr:
        meeting = {"MASTER_ADDR": master_addr, STORE: f"{master_addr}:{master_port}", ATTEMPT: str(attempt)}
    kind = plan.site.launcher.kind
    if kind == "pals":
        return _pals(plan, meeting, attempt, resume)
    if len(plan.groups) > 1:
        raise LaunchError(f"{plan.name}: {len(plan.groups)} groups of ranks, which {kind} does not start; only pals does")
    if kind == "srun":
        return _srun(plan, hosts, meeting, resume)
    if len(hosts) > 1:
        raise LaunchError(f"{plan.name}: {kind} starts ranks on one host, not on {len(hosts)}; use a site with pals or srun")
    return _local(plan, meeting, resume)


def program_words(plan: JobPlan, group: Group, resume: bool = False) -> tuple[str, ...]:
    """What each rank of a group runs, in the environment of its role.

    That is set by env(1), as the options of PALS's mpiexec for the environment are of all groups, and none unsets.
    """
    run_dir = Path(plan.run_dir)
    own = (f"name={run_dir.name}", f"runs_dir={run_dir.parent}")
    going_on = ("--resume", plan.run_dir) if resume else ()
    command = (plan.rank_python, "-m", "mas_hpc", plan.job, plan.config, *plan.overrides, *own, *going_on)
    return (*env_words(group.environment), *command)


def env_words(profile: Profile) -> tuple[str, ...]:
    """env(1) with a profile; nothing for an empty one."""
    unset = [word for name in profile.unset for word in ("-u", name)]
    settings = [f"{name}={value}" for name, value in sorted(profile.set.items())]
    return ("env", *unset, *settings) if unset or settings else ()


def _pals(plan: JobPlan, meeting: Mapping[str, str], attempt: int, resume: bool) -> tuple[str, ...]:
    """All but -n and the program is of the whole application: of the groups' options PALS reads only few.

    Source: Cray-HPE/craycli cray/modules/mpiexec/cli.py, parse_mpmd_args: -n, --wdir, --umask, --depth.
    """
    first = plan.groups[0]
    if any((group.ranks_per_node, group.cores) != (first.ranks_per_node, first.cores) for group in plan.groups):
        raise LaunchError(f"{plan.name}: PALS has one --ppn and one --cpu-bind for all groups; give them the same binding")
    binding = ("--cpu-bind", "list:" + ":".join(first.cores)) if first.cores else ()
    # PALS tells ranks neither how many they are nor how many groups: world.py reads this.
    told = {"PALS_WORLD_SIZE": str(plan.num_ranks), **meeting}
    words = [
        "mpiexec", "-n", str(first.ranks), "--ppn", str(first.ranks_per_node), "--hostfile", str(plan.hostfile(attempt)),
        *binding, *plan.site.launcher.options,
        *(word for name, value in told.items() for word in ("--env", f"{name}={value}")),
        *program_words(plan, first, resume),
    ]  # fmt: skip
    for group in plan.groups[1:]:
        words += [":", "-n", str(group.ranks), *program_words(plan, group, resume)]
    return tuple(words)


def _srun(plan: JobPlan, hosts: Sequence[str], meeting: Mapping[str, str], resume: bool) -> tuple[str, ...]:
    (group,) = plan.groups
    masks = ",".join(hex(sum(1 << core for core in parse_cores(text))) for text in group.cores)
    return (
        "srun", f"--nodes={group.nodes}", f"--ntasks={group.ranks}", f"--ntasks-per-node={group.ranks_per_node}",
        f"--nodelist={','.join(hosts)}", *((f"--cpu-bind=mask_cpu:{masks}",) if masks else ()), *plan.site.launcher.options,
        *env_words(Profile(set=dict(meeting))), *program_words(plan, group, resume),
    )  # fmt: skip


def _local(plan: JobPlan, meeting: Mapping[str, str], resume: bool) -> tuple[str, ...]:
    (group,) = plan.groups
    common = plan.site.common
    environment = env_words(Profile(set={**common.set, **meeting}, unset=common.unset))
    program = program_words(plan, group, resume)
    options = plan.site.launcher.options
    if plan.site.launcher.kind == "mpiexec":
        return (*environment, "mpiexec", "-n", str(group.ranks), *options, *program)
    start = (plan.rank_python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={group.ranks}", *options)
    role, command = program[: program.index(plan.rank_python)], program[program.index(plan.rank_python) + 1 :]
    return (*environment, *role, *start, *command)
