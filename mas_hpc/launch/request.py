"""From what a user asks for to a JobPlan: every decision that is left to the launcher is made here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from mas_hpc.config import RunConfig
from mas_hpc.errors import ConfigError
from mas_hpc.launch.choice import choose_job
from mas_hpc.launch.plan import Group, Job, JobPlan, Staged
from mas_hpc.launch.site import Binding, Profile, Role, Site, parse_cores

STAGED = "mas_hpc"
"""Folder below a node's scratch that staged copies are in."""
ONE_WORD = "expected one word, of letters, digits and _ . + -, that begins with a letter or digit"
EXPECTED = dict.fromkeys(("config", "run_dir", "cwd", "python", "stage"), "expected an absolute path in one line")
"""Of what is no word, by the key of the plan."""
SIGNAL_S = 600
"""Seconds that a checkpoint at the end of the walltime is given, or a sixth of a short walltime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A job as a user describes it; what is left at its default is decided by plan_job.

    Example: Request(config_file=Path("configs/mas.yaml"), config=config, site=load_site("aurora"), job="rollout", nodes=2, ...)
    """

    config_file: Path
    config: RunConfig
    """That of the file with the overrides."""
    site: Site
    python: Path
    """Interpreter that mas_hpc is installed for."""
    job: Job | Literal[""] = ""
    """Empty: the one that the configuration is for."""
    overrides: Sequence[str] = ()
    nodes: int = 1
    """With ranks: spares come on top."""
    walltime: str = ""
    project: str = ""
    queue: str = ""
    """Empty: the first of the site's that takes the job and those chained to it."""
    ranks_per_node: int = 0
    """0: as the site's first bind list has them."""
    filesystems: str = ""
    """Separated by colons, as PBS has them; empty: the site's."""
    spares: int = 0
    chain: int = 0
    stage: Sequence[Path] = ()
    max_restarts: int = 3
    resume: Path | None = None
    """Folder of a run that the job goes on with."""
    cwd: Path = field(default_factory=Path.cwd)
    engine_nodes: int = 0
    """Of `nodes`, the last ones, whose ranks have the role of an engine beside trainers: a plan to look at. The jobs of mas-hpc
    have no such ranks, as every one of theirs trains and serves, so command.submit refuses it."""


def plan_job(request: Request) -> JobPlan:
    """Decide what is open. Raises ConfigError for what no job can be made of; what a job had better not be, checks.py says."""
    site, config, job = request.site, request.config, request.job or choose_job(request.config).job
    per_node = request.ranks_per_node or (site.bindings[0].ranks_per_node if site.bindings else site.node.tiles)
    binding = site.binding(per_node) if site.bindings else None
    walltime_min = parse_walltime(request.walltime) if request.walltime else 0
    nodes = request.nodes + request.spares
    run_dir = stopped_run(request.cwd / request.resume) if request.resume else free_folder(request.cwd / config.folder)
    stage = tuple(_staged(request.cwd / path, site) for path in request.stage)
    try:
        return JobPlan(
            name=run_dir.name,
            site=site,
            job=job,
            config=str(request.cwd / request.config_file),
            overrides=(*request.overrides, *_staged_model(request, stage)),
            run_dir=str(run_dir),
            cwd=str(request.cwd),
            nodes=nodes,
            spares=request.spares,
            ranks_per_node=per_node,
            tensor_parallel=config.distributed.tensor_parallel,
            walltime_min=walltime_min,
            queue=request.queue or choose_queue(site, nodes, walltime_min, request.chain),
            project=request.project,
            filesystems=tuple(request.filesystems.split(":")) if request.filesystems else site.scheduler.default_filesystems,
            groups=_groups(request, job, per_node, binding),
            python=str(request.python),
            stage=stage,
            chain=request.chain,
            max_restarts=request.max_restarts,
            signal_s=min(SIGNAL_S, 10 * walltime_min),
        )
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e["loc"], e["input"], e["type"], e["msg"]) for e in error.errors())) from None


def _explain(where: Sequence[int | str], value: object, kind: str, message: str) -> str:
    """A mistake in an option, which a plan keeps under its name. Patterns are for programs."""
    key = str(where[0])
    if kind == "string_pattern_mismatch":
        message = "expected section.key=value in one line" if key == "overrides" else EXPECTED.get(key, ONE_WORD)
    return f"{key}={value!r}: {message}"


def stopped_run(folder: Path) -> Path:
    """The folder of a run to go on with. Raises ConfigError for one that no run has made."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--resume {folder}: no config.yaml there; expected the folder of a run, such as runs/mas")
    return folder


def parse_walltime(text: str) -> int:
    """Minutes of H:MM:SS, rounded up. PBS reads 6:00 as six minutes, so no other form is taken. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d)", text)
    if not match:
        raise ConfigError(f"--walltime {text}: expected H:MM:SS, such as 6:00:00")
    hours, minutes, seconds = map(int, match.groups())
    return 60 * hours + minutes + (seconds > 0)


def choose_queue(site: Site, nodes: int, walltime_min: int, chain: int) -> str:
    """The first queue that takes the job and those chained to it; empty when there is none."""
    for queue in site.scheduler.queues:
        limit = queue.limit(nodes)
        fits = limit is not None and queue.min_walltime_min <= walltime_min <= limit.max_walltime_min
        if fits and not 0 < queue.max_queued < chain + 1:
            return queue.name
    return ""


def free_folder(wanted: Path) -> Path:
    """The wanted run folder, or the first of name-2, name-3, ... that neither a run nor a job has."""
    number, folder = 1, wanted
    while folder.exists() or Path(f"{folder}.job").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def roles(job: Job, config: RunConfig, engine_nodes: int) -> tuple[Role, ...]:
    """Of the groups of ranks, in order."""
    engine: Role = config.rollout.engine
    if job in ("rollout", "evaluate"):
        return (engine,)
    return ("trainer", engine) if engine_nodes else ("trainer",)


def _groups(request: Request, job: Job, per_node: int, binding: Binding | None) -> tuple[Group, ...]:
    found = roles(job, request.config, request.engine_nodes)
    if request.engine_nodes and len(found) == 1:
        raise ConfigError(f"--engine-nodes {request.engine_nodes}: {job} has engines alone; leave it out, or --job train")
    nodes = (request.nodes - request.engine_nodes, request.engine_nodes) if len(found) == 2 else (request.nodes,)
    if min(nodes) < 1:
        raise ConfigError(
            f"--engine-nodes {request.engine_nodes} of --nodes {request.nodes}: expected at least one node for each role"
        )
    return tuple(
        Group(
            role=role, nodes=count, ranks_per_node=per_node, cores=binding.cores if binding else (),
            environment=_environment(request.site, role, binding),
        )
        for role, count in zip(found, nodes, strict=True)
    )  # fmt: skip


def _environment(site: Site, role: Role, binding: Binding | None) -> Profile:
    """What the role has beside the site's common settings, and what follows from the cores of a rank."""
    own = site.profiles.get(role, Profile())
    bound: dict[str, str] = {}
    if binding:
        cores = {core % site.node.num_cores for core in parse_cores(binding.cores[0])}
        bound["OMP_NUM_THREADS"] = str(len(cores))
        if binding.worker_cores and site.tile.device == "xpu":
            bound["CCL_WORKER_AFFINITY"] = ",".join(map(str, binding.worker_cores))
    return Profile(set={**bound, **own.set}, unset=own.unset)


def _staged(source: Path, site: Site) -> Staged:
    name = source.name.split(".")[0] or "staged"
    return Staged(source=str(source), target=f"{site.node.scratch}/{STAGED}/{name}")


def _staged_model(request: Request, stage: Sequence[Staged]) -> tuple[str, ...]:
    """Ranks read a model that is staged from its copy."""
    model = str(request.cwd / request.config.model.path)
    return tuple(f"model.path={item.target}" for item in stage if item.source == model)
