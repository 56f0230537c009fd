"""mas-hpc <command>: those about the machine. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mas_hpc.cli_options import ConfigFile, EngineNodes, JobOption, Overrides, Resume, Stage, Starter, load

if TYPE_CHECKING:
    from mas_hpc.config import RunConfig
    from mas_hpc.launch.plan import Job

app = typer.Typer()


@app.command()
def launch(  # noqa: PLR0913 (options of the command line)
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    job: JobOption = None,
    local: Annotated[bool, typer.Option("--local", help="start ranks on this host, and watch over them")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print script, command, binding, environments, checks")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="write the job folder and hand the job to the scheduler")] = False,
    ranks: Annotated[int | None, typer.Option("-n", min=2, help="ranks on this host", show_default=False)] = None,
    starter: Starter = "torchrun",
    site: Annotated[str, typer.Option(help="aurora, slurm, laptop, or the path of a site.yaml")] = "laptop",
    nodes: Annotated[int, typer.Option(min=1, help="with ranks")] = 1,
    spares: Annotated[int, typer.Option(min=0, help="further nodes, which replace those that fail")] = 0,
    walltime: Annotated[str, typer.Option(help="H:MM:SS", show_default=False)] = "",
    project: Annotated[str, typer.Option("--project", "-A", help="that pays for the job", show_default=False)] = "",
    queue: Annotated[str, typer.Option(help="default: the first that takes the job", show_default=False)] = "",
    filesystems: Annotated[str, typer.Option(help="such as home:flare; default: the site's", show_default=False)] = "",
    engine_nodes: EngineNodes = 0,
    ppn: Annotated[int, typer.Option(min=0, help="ranks of a node; 0: the site's first bind list")] = 0,
    stage: Stage = None,
    chain: Annotated[int, typer.Option(min=0, help="jobs that follow, each going on where the one before has ended")] = 0,
    max_restarts: Annotated[int, typer.Option(min=0, help="of all ranks, in a row without getting further")] = 3,
    resume: Resume = None,
) -> None:  # fmt: skip
    """Start ranks on this host, or have them started on a site's nodes; watch over them, and restart them when that can help.

    Example: mas-hpc launch --local -n 2 configs/mas.yaml rollout.stall_s=60
    Example: mas-hpc launch configs/at_grpo.yaml --site aurora --nodes 2 --walltime 1:00:00 -A PROJECT --dry-run
    """
    from mas_hpc.errors import LaunchError
    from mas_hpc.launch.request import Request, stopped_run

    if [local, dry_run, submit].count(True) != 1:
        raise LaunchError("launch: expected one of --local (on this host), --dry-run (show the job) and --submit (hand it in)")
    loaded = load(config, overrides)  # a mistake is said once, not by every rank
    if local:
        _refuse_idle(context, _OF_A_SITE, "--local starts ranks on this host")
        job = _job_here(job, loaded)
        going_on = ("--resume", str(stopped_run(resume))) if resume else ()
        command = (sys.executable, "-m", "mas_hpc", job, str(config), *(overrides or ()), *going_on)
        raise typer.Exit(_start_here(job, command, ranks, max_restarts, starter, loaded))
    from rich.console import Console

    from mas_hpc.launch import command as launcher
    from mas_hpc.launch.site import load_site

    machine = load_site(site)
    if machine.scheduler.kind != "none":
        _refuse_idle(context, ("ranks", "starter"), f"{machine.name} has nodes: --nodes and --ppn say how many ranks there are")
    else:
        idle = [name for name in _OF_A_SITE if name not in ("site", "ppn")] + (["ppn"] if ranks else [])
        _refuse_idle(context, idle, f"{machine.name} is one host without a scheduler: -n says how many ranks there are")
    request = Request(
        config_file=config, config=loaded, site=machine.started_by(starter), job=job or "", python=Path(sys.executable),
        overrides=overrides or (), nodes=nodes, walltime=walltime, project=project, queue=queue,
        ranks_per_node=ppn or ranks or 0, filesystems=filesystems, spares=spares, chain=chain, engine_nodes=engine_nodes,
        stage=stage or (), max_restarts=max_restarts, resume=resume,
    )  # fmt: skip
    raise typer.Exit((launcher.dry_run if dry_run else launcher.submit)(request, Console()))


def _job_here(job: Job | None, config: RunConfig) -> Job:
    """The one that is asked for, or that the configuration is for. Raises ConfigError for one that it cannot do."""
    from mas_hpc.distributed.supervisor import say
    from mas_hpc.errors import ConfigError
    from mas_hpc.launch.choice import choose_job, unfit

    choice = choose_job(config)
    if not job:
        say(f"{choice.job}: {choice.why} (--job pipeline, rollout, train or evaluate for another)")
    if why := unfit(job or choice.job, config):
        raise ConfigError(why)
    return job or choice.job


def _start_here(
    job: str, command: tuple[str, ...], ranks: int | None, max_restarts: int, starter: Literal["torchrun", "mpiexec"],
    config: RunConfig,
) -> int:  # fmt: skip
    from mas_hpc.distributed import supervisor
    from mas_hpc.errors import LaunchError

    if ranks is None:
        raise LaunchError("launch --local: -n RANKS is missing; at least 2")
    plan = supervisor.Launch(
        job=job, command=command, ranks=ranks, max_restarts=max_restarts, starter=starter,
        shares_layers=config.distributed.tensor_parallel > 1,
    )  # fmt: skip
    return supervisor.launch(plan)


_OF_A_SITE = ("site", "nodes", "spares", "walltime", "project", "queue", "filesystems", "engine_nodes", "ppn", "stage", "chain")


def _refuse_idle(context: typer.Context, names: Sequence[str], why: str) -> None:
    """An option that would be ignored is a misunderstanding."""
    from mas_hpc.errors import LaunchError

    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [options[name] for name in names if (source := context.get_parameter_source(name)) and source.name != "DEFAULT"]
    if given:
        raise LaunchError(f"launch: {why}; leave {', '.join(given)} out")


@app.command()
def env(
    device: Annotated[Literal["auto", "cpu", "cuda", "xpu"], typer.Option(help="as distributed.device")] = "auto",
    runs_dir: Annotated[Path, typer.Option(help="where runs would be written")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Print what a run would find here: versions, host, launcher, device, kernels, disk; also under torchrun and mpiexec.

    Example: mas-hpc env --json
    """
    from mas_hpc.phases.environment import report_environment

    report_environment(device, runs_dir, as_json=as_json)


@app.command()
def doctor(
    mpi: Annotated[bool, typer.Option("--mpi", help="all ranks of an mpiexec or a torchrun, together")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    site: Annotated[str, typer.Option(help="aurora, slurm, laptop, or the path of a site.yaml")] = "laptop",
    config: Annotated[Path | None, typer.Option(help="look for its models, and room for its runs", show_default=False)] = None,
    run: Annotated[Path | None, typer.Option(help="folder of a run: look at its checkpoints", show_default=False)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "xpu"], typer.Option(help="of ranks, as distributed.device")] = "auto",
) -> None:
    """Check this node, or with --mpi all nodes of a job; each check says what it saw and what to do. Fails on an error.

    Example: mas-hpc doctor --site aurora --json
    Example: mpiexec -n 2 mas-hpc doctor --mpi
    """
    from rich.console import Console

    from mas_hpc.distributed.world import inherited
    from mas_hpc.doctor.gather import Subject
    from mas_hpc.launch.site import load_site

    loaded = load(config, None) if config else None
    subject = Subject(site=load_site(site), environment=inherited(), config=loaded, run=run, tries_exchange=not mpi)
    if mpi:
        from mas_hpc.doctor.ranks import report_ranks

        raise typer.Exit(report_ranks(subject, device, Console(), as_json=as_json))
    from mas_hpc.doctor.node import report_node

    raise typer.Exit(report_node(subject, Console(), as_json=as_json))


@app.command()
def scale(  # noqa: PLR0913 (options of the command line)
    config: Annotated[Path | None, typer.Argument(help="YAML configuration", show_default=False)] = None,
    overrides: Overrides = None,
    site: Annotated[str, typer.Option(help="aurora, slurm, laptop, or the path of a site.yaml")] = "aurora",
    nodes: Annotated[str, typer.Option(help="256, or 4,8,16, or 1..10000 in powers of two")] = "1..10000",
    weak: Annotated[bool, typer.Option("--weak", help="the batch grows with the nodes, from the first number on")] = False,
    shape: Annotated[str, typer.Option(help="in place of model.path: agpt-2b, agpt-20b, agpt-70b, a config.json")] = "",
    traces: Annotated[Path | None, typer.Option(help="traces.jsonl of a run, for lengths", show_default=False)] = None,
    question_tokens: Annotated[float, typer.Option(min=1, help="in the mean, without --traces")] = 200.0,
    completion_tokens: Annotated[float, typer.Option(min=0, help="the same; 0: half of rollout.max_new_tokens")] = 0.0,
    calibration: Annotated[Path | None, typer.Option(help="file of mas-hpc calibrate", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw it: a name ending in .svg or .html", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="published points beside what the model says of them")] = False,
) -> None:  # fmt: skip
    """Predict what a step takes on numbers of nodes: seconds, memory, efficiency, node-hours, what limits, what to change.

    Example: mas-hpc scale configs/at_grpo.yaml --site aurora --nodes 4..2048 --weak --shape agpt-20b
    Example: mas-hpc scale --validate
    """
    from mas_hpc.errors import ConfigError
    from mas_hpc.phases.scale import lengths_of, show_points, show_predictions

    if validate == (config is not None):
        raise ConfigError("scale: expected either a configuration, or --validate alone")
    if config is None:
        return show_points()
    loaded = load(config, overrides)
    show_predictions(
        loaded, site, nodes, lengths_of(loaded, traces, question_tokens, completion_tokens), calibration=calibration,
        shape=shape, weak=weak, as_json=as_json, plot_file=plot,
    )  # fmt: skip


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="file that is written")] = Path("calibration.json"),
    ranks: Annotated[int, typer.Option("-n", min=1, help="ranks to start on this host; under a launcher leave it out")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda", "xpu"], typer.Option(help="as distributed.device")] = "auto",
) -> None:
    """Measure products, memory, training passes and collectives of these ranks; mas-hpc scale --calibration reads the file.

    Example: mas-hpc calibrate -n 2 -o calibration.json
    """
    from mas_hpc.phases.calibrate import calibrate as measure
    from mas_hpc.phases.calibrate import start

    raise typer.Exit(start(output, ranks, device) if ranks > 1 else measure(output, device))


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(help="folder of runs, or one run")] = Path("runs"),
    log: Annotated[bool, typer.Option("--log", help="of one run: the lines of all its ranks, by time")] = False,
) -> None:
    """Print what runs are doing: state, step, tokens per second, last sign of life, from what they wrote themselves.

    Example: mas-hpc jobs; mas-hpc jobs runs/mas --log
    """
    from rich.console import Console

    from mas_hpc.launch.jobs import jobs_table, look_at, merged_log

    if log:
        for line in merged_log(folder):
            typer.echo(line)
    else:
        Console().print(jobs_table(look_at(folder)))


@app.command()
def bench(name: Annotated[str, typer.Argument(help="Benchmark, such as tree or rollout", show_default=False)]) -> None:
    """Run benchmarks/bench_<name>.py: ours and its peers in one call; writes benchmarks/results/<name>.json.

    Example: mas-hpc bench tree
    """
    import subprocess

    from mas_hpc.errors import ConfigError

    folder = Path(__file__).parents[1] / "benchmarks"
    names = sorted(file.stem.removeprefix("bench_") for file in folder.glob("bench_*.py"))
    if name not in names:
        raise ConfigError(f"bench {name!r}: expected one of {names} (benchmarks live in a source checkout: {folder})")
    raise typer.Exit(subprocess.call([sys.executable, str(folder / f"bench_{name}.py")]))
