"""What is checked before a job costs nodes. Each check is a function of the plan, and what it says is a Finding."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mas_hpc.config import RunConfig
from mas_hpc.config_methods import OnlineConfig
from mas_hpc.launch.binding import check_binding
from mas_hpc.launch.choice import choose_job, unfit
from mas_hpc.launch.environments import check_environments
from mas_hpc.launch.finding import Finding
from mas_hpc.launch.plan import JobPlan

HOUR_MIN = 60
BUILT_IN = ("tiny", "smollm2")
"""Models that no hub is asked for."""
MANY_NODES = 256
"""Where one or two nodes fail almost certainly, and imports from a shared file system hurt; EZ docs/cli/yeet.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What is seen where the job would be submitted.

    Example: Here(is_site=True, missing=())
    """

    is_site: bool
    """Whether this machine is of the site: its file systems are here, or it wants none."""
    missing: tuple[str, ...] = ()
    """Of what is to be staged, what is not there."""


def look_around(plan: JobPlan) -> Here:
    """The only check that looks at this machine."""
    wanted = plan.site.scheduler.submit_from
    is_site = not wanted or any(Path(prefix).is_dir() for prefix in wanted)
    return Here(is_site=is_site, missing=tuple(s.source for s in plan.stage if not Path(s.source).exists()))


def check_job(plan: JobPlan, config: RunConfig, here: Here) -> list[Finding]:
    """All findings, in the order of the checks."""
    return [
        check_name(plan, config),
        check_queue(plan),
        check_project(plan),
        check_filesystems(plan),
        check_folder(plan, here),
        *check_binding(plan),
        *check_environments(plan),
        check_ranks(plan, config),
        check_roles(plan, config),
        check_spares(plan),
        check_staging(plan, here),
        check_model(plan, config),
        check_data(plan, config),
        check_hang(plan, config),
        check_checkpoints(plan, config),
        check_chain(plan, config),
    ]


def check_name(plan: JobPlan, config: RunConfig) -> Finding:
    """Which job it is and why, and whether the configuration can do it: otherwise its ranks would say so, on all nodes."""
    choice, others = choose_job(config), "--job pipeline, rollout, train or evaluate for another"
    if why := unfit(plan.job, config):
        remedy = f"--job {choice.job}, or another configuration"
        return Finding(name="job", verdict="error", evidence=f"{plan.job}: {why}", remedy=remedy)
    given = f"as --job says; the configuration is for {choice.job}"
    why = choice.why if plan.job == choice.job else given
    return Finding(name="job", verdict="ok", evidence=f"{plan.job}: {why} ({others})")


def check_queue(plan: JobPlan) -> Finding:
    """Nodes and walltime against the queue's limits; the remedy names what the site does take."""
    queues = plan.site.scheduler.queues
    if not queues:
        return Finding(name="queue", verdict="skipped", evidence=f"{plan.site.name} has no scheduler")
    asked = f"{plan.nodes} nodes{f' ({plan.spares} spare)' if plan.spares else ''} for {as_walltime(plan.walltime_min)}"
    if not plan.walltime_min:
        return Finding(name="queue", verdict="error", evidence="no walltime", remedy="--walltime H:MM:SS")
    known = [queue for queue in queues if queue.name == plan.queue]
    if plan.queue and not known:
        names = ", ".join(queue.name for queue in queues)
        remedy = f"--queue one of {names}, or none: the first that takes the job"
        return Finding(name="queue", verdict="error", evidence=f"{plan.queue}: no queue of {plan.site.name}", remedy=remedy)
    for queue in known:
        limit = queue.limit(plan.nodes)
        if limit and queue.min_walltime_min <= plan.walltime_min <= limit.max_walltime_min:
            return Finding(name="queue", verdict="ok", evidence=f"{queue.name} takes {asked}")
    what = f"{plan.queue} does not take" if plan.queue else f"no queue of {plan.site.name} takes"
    return Finding(name="queue", verdict="error", evidence=f"{what} {asked}", remedy=" or ".join(alternatives(plan)))


def alternatives(plan: JobPlan) -> list[str]:
    """Jobs near this one that some queue takes: the nearest number of nodes below and above, and the longest walltime."""
    shortest = min(queue.min_walltime_min for queue in plan.site.scheduler.queues)
    if plan.walltime_min < shortest:
        return [f"a walltime of at least {as_walltime(shortest)}"]
    fewer, more, shorter = dict[int, str](), dict[int, str](), dict[int, str]()
    for queue in plan.site.scheduler.queues:
        for limit in queue.limits:
            lasts = plan.walltime_min <= limit.max_walltime_min
            if lasts and limit.max_nodes < plan.nodes:
                fewer.setdefault(limit.max_nodes, queue.name)
            elif lasts and limit.min_nodes > plan.nodes:
                more.setdefault(limit.min_nodes, queue.name)
            elif not lasts and limit.min_nodes <= plan.nodes <= limit.max_nodes:
                shorter.setdefault(limit.max_walltime_min, queue.name)
    found = [f"at most {max(fewer)} nodes in {fewer[max(fewer)]}"] if fewer else []
    found += [f"at least {min(more)} nodes in {more[min(more)]}"] if more else []
    found += [f"at most {as_walltime(max(shorter))} in {shorter[max(shorter)]}"] if shorter else []
    return found or ["fewer nodes, for a shorter time"]


def check_project(plan: JobPlan) -> Finding:
    """PBS accounts every job to one."""
    if plan.site.scheduler.kind != "pbs":
        return Finding(name="project", verdict="skipped", evidence=f"{plan.site.name} asks for none")
    if not plan.project:
        return Finding(name="project", verdict="error", evidence="none", remedy="-A PROJECT, whose allocation pays for the job")
    return Finding(name="project", verdict="ok", evidence=plan.project)


def check_filesystems(plan: JobPlan) -> Finding:
    """A job sees no file system that it has not named."""
    scheduler = plan.site.scheduler
    if not scheduler.filesystems and plan.filesystems:
        evidence = f"{':'.join(plan.filesystems)}: jobs of {plan.site.name} name none"
        return Finding(name="filesystems", verdict="error", evidence=evidence, remedy="leave --filesystems out")
    if not scheduler.filesystems:
        return Finding(name="filesystems", verdict="skipped", evidence=f"{plan.site.name} asks for none")
    if unknown := [name for name in plan.filesystems if name not in scheduler.filesystems]:
        remedy = f"--filesystems with names of {':'.join(scheduler.filesystems)}"
        return Finding(name="filesystems", verdict="error", evidence=f"unknown: {':'.join(unknown)}", remedy=remedy)
    used = {_filesystem(plan, path): path for path in (plan.config, plan.run_dir, plan.python, *(s.source for s in plan.stage))}
    absent = {name: path for name, path in used.items() if name and name not in plan.filesystems}
    if absent:
        evidence = "; ".join(f"{path} is on {name}" for name, path in absent.items())
        remedy = f"--filesystems {':'.join((*plan.filesystems, *sorted(absent)))}"
        return Finding(name="filesystems", verdict="error", evidence=f"{evidence}, which the job does not name", remedy=remedy)
    return Finding(name="filesystems", verdict="ok", evidence=":".join(plan.filesystems))


def _filesystem(plan: JobPlan, path: str) -> str:
    mounts = plan.site.scheduler.mounts
    return next((name for prefix, name in mounts.items() if _is_below(path, prefix)), "")


def _is_below(path: str | Path, folder: str) -> bool:
    return Path(os.path.normpath(path)).is_relative_to(folder)


def check_folder(plan: JobPlan, here: Here) -> Finding:
    """Some file systems bear no jobs."""
    wanted = plan.site.scheduler.submit_from
    if not wanted:
        return Finding(name="folder", verdict="skipped", evidence=f"{plan.site.name} takes jobs from any")
    if not here.is_site:
        return Finding(name="folder", verdict="skipped", evidence=f"this machine is not {plan.site.name}: no {wanted[0]}")
    wrong = [path for path in (plan.cwd, plan.run_dir) if not any(_is_below(path, prefix) for prefix in wanted)]
    if wrong:
        remedy = f"submit from a folder below {' or '.join(wanted)}, with runs_dir below it"
        return Finding(name="folder", verdict="error", evidence=f"{' and '.join(wrong)}: no place for jobs", remedy=remedy)
    return Finding(name="folder", verdict="ok", evidence=plan.cwd)


def check_ranks(plan: JobPlan, config: RunConfig) -> Finding:
    """The number of ranks against what has to divide into them."""
    ranks, method = plan.num_ranks, config.method
    trains = plan.job in ("train", "pipeline")
    if trains and isinstance(method, OnlineConfig) and method.tasks_per_step % ranks:
        above = -(-method.tasks_per_step // ranks) * ranks
        evidence = f"{ranks} ranks do not divide method.tasks_per_step={method.tasks_per_step}"
        return Finding(name="ranks", verdict="error", evidence=evidence, remedy=f"method.tasks_per_step={above}")
    shards = config.distributed.shard_size
    if trains and shards and ranks % shards:
        evidence = f"distributed.shard_size={shards} does not divide {ranks} ranks"
        return Finding(name="ranks", verdict="error", evidence=evidence, remedy=f"distributed.shard_size={plan.ranks_per_node}")
    if plan.job == "rollout" and config.rollout.num_tasks < ranks:
        evidence = f"rollout.num_tasks={config.rollout.num_tasks} for {ranks} ranks: the others are idle"
        return Finding(name="ranks", verdict="warning", evidence=evidence, remedy=f"rollout.num_tasks of {ranks} or more")
    if config.distributed.strategy.startswith("zero") and plan.ranks_per_node < plan.site.node.tiles:
        evidence = f"{plan.ranks_per_node} ranks a node: DeepSpeed takes the tile of a rank's number, beside other cores"
        return Finding(name="ranks", verdict="warning", evidence=evidence, remedy=f"--ppn {plan.site.node.tiles}, or fsdp2")
    return Finding(name="ranks", verdict="ok", evidence=f"{ranks}: {plan.num_active} nodes x {plan.ranks_per_node}")


def check_roles(plan: JobPlan, config: RunConfig) -> Finding:
    """vLLM in a trainer's process has the trainer's settings, which its own profile unsets."""
    trainer, vllm = plan.site.environment("trainer").set, plan.site.environment("vllm").set
    differ = sorted(name for name in trainer if trainer[name] != vllm.get(name))
    if config.rollout.engine == "vllm" and [group.role for group in plan.groups] == ["trainer"] and differ:
        evidence = f"vLLM runs in the trainer's processes, with the trainer's {', '.join(differ)}"
        remedy = "rollout.engine=native, or play in a job of its own (--job rollout) and train on its traces"
        return Finding(name="roles", verdict="warning", evidence=evidence, remedy=remedy)
    if len(plan.groups) > 1:
        remedy = "leave --engine-nodes out to hand the job in: every rank trains and serves"
        evidence = f"{_roles(plan)}: the program has no ranks that only serve, so this is a plan to look at"
        return Finding(name="roles", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="roles", verdict="ok", evidence=_roles(plan))


def _roles(plan: JobPlan) -> str:
    return ", ".join(f"{group.nodes} nodes {group.role}" for group in plan.groups)


def check_spares(plan: JobPlan) -> Finding:
    """One bad node ends a job that has none to replace it."""
    if plan.num_active >= MANY_NODES and not plan.spares:
        evidence = f"none for {plan.num_active} nodes, of which one or two fail almost certainly"
        return Finding(name="spares", verdict="warning", evidence=evidence, remedy="--spares 2 or more")
    return Finding(name="spares", verdict="ok", evidence=f"{plan.spares} for {plan.num_active} nodes")


def check_staging(plan: JobPlan, here: Here) -> Finding:
    """Thousands of ranks that import from a shared file system take it down."""
    if here.missing and here.is_site:
        evidence = f"not there: {', '.join(here.missing)}"
        return Finding(name="staging", verdict="error", evidence=evidence, remedy="--stage with a file or folder that exists")
    if here.missing:
        evidence = f"not seen, as this machine is not {plan.site.name}: {', '.join(here.missing)}"
        return Finding(name="staging", verdict="warning", evidence=evidence, remedy="its path there; --submit looks again")
    if plan.site.scheduler.kind != "none" and plan.num_active >= MANY_NODES and not any(s.is_environment for s in plan.stage):
        evidence = f"{plan.num_ranks} ranks import from {plan.python}"
        remedy = "--stage env.tar.gz: the environment, relocatable, with bin/python inside"
        return Finding(name="staging", verdict="warning", evidence=evidence, remedy=remedy)
    staged = ", ".join(f"{item.source} -> {item.target}" for item in plan.stage)
    return Finding(name="staging", verdict="ok", evidence=staged or "nothing")


def check_model(plan: JobPlan, config: RunConfig) -> Finding:
    """Compute nodes that are offline find no model that is not a folder, built in, or in the cache."""
    paths = {"model.path": config.model.path, **{f"team.models.{name}": path for name, path in config.team.models.items()}}
    return _reached("model", plan, paths, BUILT_IN)


def check_data(plan: JobPlan, config: RunConfig) -> Finding:
    """The same of questions and records; those of a generator need no file."""
    path = getattr(config.data, "path", "")
    return _reached("data", plan, {"data.path": path} if path else {})


def _reached(name: str, plan: JobPlan, paths: Mapping[str, str], built_in: Sequence[str] = ()) -> Finding:
    offline = plan.site.common.set.get("HF_HUB_OFFLINE") == "1"
    staged = [item.source for item in plan.stage]
    remote = {
        key: path for key, path in paths.items()
        if path not in built_in and str(Path(plan.cwd, path)) not in staged and not Path(plan.cwd, path).exists()
    }  # fmt: skip
    if offline and remote:
        cache = plan.site.common.set.get("HF_HOME", "the cache that nodes see")
        evidence = f"{', '.join(f'{key}={path}' for key, path in remote.items())}: not a file or folder here; ranks are offline"
        remedy = f"a path that there is, or what hf download has brought to {cache}"
        return Finding(name=name, verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name=name, verdict="ok", evidence=", ".join(paths.values()) or "made by a generator")


def check_hang(plan: JobPlan, config: RunConfig) -> Finding:
    """A watchdog that waits longer than the job lasts watches nothing."""
    hang_min = config.distributed.hang_s / 60
    if plan.walltime_min and hang_min > plan.walltime_min / 2:
        evidence = f"distributed.hang_s={config.distributed.hang_s:g} of a walltime of {60 * plan.walltime_min} s"
        remedy = f"distributed.hang_s={15 * plan.walltime_min}, if no save or load takes longer"
        return Finding(name="hang", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="hang", verdict="ok", evidence=f"ranks that hang end after {hang_min:g} minutes")


def check_checkpoints(plan: JobPlan, config: RunConfig) -> Finding:
    """What is not kept is trained again."""
    if plan.job in ("rollout", "evaluate"):
        return Finding(name="checkpoints", verdict="skipped", evidence=f"{plan.job}: finished traces are kept at once")
    if not config.checkpoint.every and plan.walltime_min > HOUR_MIN:
        evidence = f"checkpoint.every=0 for {as_walltime(plan.walltime_min)}: a fault costs all of it"
        return Finding(
            name="checkpoints", verdict="warning", evidence=evidence, remedy="checkpoint.every: 15 to 60 minutes apart"
        )
    last = f", and one {plan.signal_s} s before the walltime ends" if plan.walltime_min else ""
    return Finding(name="checkpoints", verdict="ok", evidence=f"checkpoint.every={config.checkpoint.every}{last}")


def check_chain(plan: JobPlan, config: RunConfig) -> Finding:
    """Jobs that follow need a place in the queue, and something to go on from."""
    if not plan.chain:
        what = "no job follows one that runs out of time, or loses its first node, which supervises the others"
        return Finding(name="chain", verdict="skipped", evidence=what if plan.walltime_min else "no job follows")
    if plan.site.scheduler.kind == "none":
        return Finding(name="chain", verdict="error", evidence="no scheduler", remedy="leave --chain out")
    if plan.job in ("train", "pipeline") and not config.checkpoint.every:
        evidence = f"{plan.chain} jobs follow, and checkpoint.every=0 leaves them nothing to go on from"
        return Finding(name="chain", verdict="error", evidence=evidence, remedy="set checkpoint.every")
    for queue in plan.site.scheduler.queues:
        if queue.name == plan.queue and 0 < queue.max_queued < plan.chain + 1:
            evidence = f"{queue.name} takes {queue.max_queued} jobs of a user at once, not {plan.chain + 1}"
            return Finding(name="chain", verdict="error", evidence=evidence, remedy=f"--chain {queue.max_queued - 1}")
    return Finding(name="chain", verdict="ok", evidence=f"{plan.chain} jobs follow, each after the end of the one before")


def as_walltime(minutes: int) -> str:
    """360 is 6:00:00."""
    return f"{minutes // 60}:{minutes % 60:02}:00"
