"""mas-hpc <command>: a thin face over run.py and phases/. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mas_hpc.errors import MasHpcError

if TYPE_CHECKING:
    from mas_hpc.config import RunConfig
    from mas_hpc.run import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration, such as configs/quickstart.yaml", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them", show_default=False)]
Resume = Annotated[
    Path | None, typer.Option(help="folder of a run that was stopped: play only what is missing there", show_default=False)
]


@app.callback()
def about() -> None:
    """Post-train and evaluate multi-agent systems of language models.

    Example: mas-hpc pipeline configs/quickstart.yaml method.steps=50
    """


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Resolve and validate a configuration and print the plan; imports no torch.

    Example: mas-hpc check configs/at_grpo.yaml method.group_size=4
    """
    from mas_hpc.plan import print_plan

    print_plan(_load(config, overrides))


@app.command(name="config")
def reference() -> None:
    """Print every knob with its type, default and meaning.

    Example: mas-hpc config | less
    """
    from mas_hpc.plan import print_knobs

    print_knobs()


@app.command()
def pipeline(config: ConfigFile, overrides: Overrides = None) -> None:
    """Build, warm start, evaluate, train, evaluate again and report.

    Example: mas-hpc pipeline configs/quickstart.yaml seed=1
    """
    from mas_hpc.phases import evaluation, training

    def job(run: Run) -> None:
        training.check(run)
        run = training.warm_up(run)
        before = evaluation.evaluate(run, "before")
        training.train(run)
        _finish(run, [*before, *evaluation.evaluate(run, "after")])

    _with_run(_playable(_trainable(_load(config, overrides)), pipeline=True), job)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run one method (method.kind) and save its weights.

    Example: mas-hpc train configs/at_grpo.yaml method.steps=20
    """
    from mas_hpc.phases import training

    def job(run: Run) -> None:
        training.check(run)
        training.train(training.warm_up(run))
        _report(run)

    _with_run(_trainable(_load(config, overrides)), job)


@app.command()
def rollout(config: ConfigFile, overrides: Overrides = None, resume: Resume = None) -> None:
    """Run a team on questions and write its traces.

    Example: mas-hpc rollout configs/mas.yaml data.path=gsm8k/test.jsonl rollout.num_tasks=8
    """
    from mas_hpc.phases import evaluation, training

    def job(run: Run) -> None:
        evaluation.rollout(training.keep(training.warm_up(run)))
        _report(run)

    _with_run(_playable(_load(config, overrides)), job, trains=False, resume=resume)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, resume: Resume = None) -> None:
    """Measure a team, or a single agent, and its equal-token controls on held-out questions.

    Example: mas-hpc evaluate configs/mas.yaml data.path=gsm8k/test.jsonl evaluation.num_tasks=20
    """
    from mas_hpc.phases import evaluation, training

    def job(run: Run) -> None:
        run = training.keep(training.warm_up(run))
        _finish(run, evaluation.evaluate(run, ""))

    _with_run(_playable(_load(config, overrides)), job, trains=False, resume=resume)


@app.command()
def launch(
    ranks: Annotated[int, typer.Option("-n", min=2, help="ranks to start", show_default=False)],
    config: ConfigFile,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="on this host")] = False,
    job: Annotated[Literal["pipeline", "rollout", "train", "evaluate"], typer.Option(help="what the ranks do")] = "rollout",
    max_restarts: Annotated[int, typer.Option(min=0, help="of all ranks; rollout and evaluate only")] = 3,
    resume: Resume = None,
) -> None:
    """Start ranks on this host and watch over them: the work of one that dies goes to the others.

    Example: mas-hpc launch --local -n 2 --job rollout configs/mas.yaml rollout.stall_s=60
    """
    from mas_hpc.errors import LaunchError

    if resume and job not in ("rollout", "evaluate"):
        raise LaunchError(f"--resume: {job} begins anew; only --job rollout and --job evaluate go on where they were")
    if not local:
        raise LaunchError("launch starts ranks on this host alone: add --local; on several: mpiexec ... mas-hpc <command> ...")
    _load(config, overrides)  # a mistake is said once, not by every rank
    from mas_hpc.distributed import supervisor

    going_on = ("--resume", str(resume)) if resume else ()
    command = (sys.executable, "-m", "mas_hpc", job, str(config), *(overrides or ()), *going_on)
    plan = supervisor.Launch(job=job, command=command, ranks=ranks, max_restarts=max_restarts)
    raise typer.Exit(supervisor.launch(plan))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder, such as runs/quickstart", show_default=False)],
) -> None:
    """Build, or build again, the HTML report of a run.

    Example: mas-hpc report runs/quickstart
    """
    from mas_hpc.evaluation.report.build import build_report

    typer.echo(f"report: {build_report(folder)}")


@app.command()
def credit(  # noqa: PLR0913 (options of the command line)
    folder: Annotated[Path, typer.Argument(help="Run folder, such as runs/mas", show_default=False)],
    method: Annotated[
        Literal["shapley", "loo", "first_error", "process_reward", "local", "outcome", "reward_blame"],
        typer.Option(
            help="shapley, loo: of agents; first_error: who failed; reward_blame: shapley on success, blame on failure"
        ),
    ] = "shapley",
    value: Annotated[
        Literal["removal", "replacement", "masked", "resample"],
        typer.Option(help="what a coalition is worth: the others skipped, replaced, masked from the record, or resampled"),
    ] = "removal",
    replays: Annotated[int, typer.Option(min=1, help="replays that each value is the mean of")] = 4,
    traces: Annotated[
        str, typer.Option(help="file under traces/, without .jsonl; default: rollout, else the last evaluation")
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="most traces; 0: all")] = 0,
    localizer: Annotated[
        Literal["value", "checks", "prm", "all_at_once", "step_by_step", "binary"],
        typer.Option(help="first error by values of prefixes, executable checks, a PRM, or an LLM judge in one of three ways"),
    ] = "value",
    epsilon: Annotated[
        float, typer.Option(min=0.0, help="least drop of a value that is an error; 0: max(0.15, 1.5 / replays), or 0.5 for one")
    ] = 0.0,
    resamples: Annotated[int, typer.Option(min=0, help="alternatives to a message, for preference pairs; 0: none")] = 0,
    pairs: Annotated[
        Literal["faults", "all"], typer.Option(help="which messages get alternatives: first errors, or all")
    ] = "faults",
    base: Annotated[str, typer.Option(help="model that replaces absent agents; default: the base under the adapters")] = "",
    reward_model: Annotated[str, typer.Option(help="trained PRM: runs/<name>/model")] = "",
    seed: Annotated[int, typer.Option(help="of the replays")] = 0,
) -> None:
    """Say who earned the reward of a run's traces and who is to blame; write pairs and step labels that `train` reads.

    Example: mas-hpc credit runs/mas --method shapley --value masked --replays 4
    """
    from rich.console import Console

    from mas_hpc.distributed.world import World, connected
    from mas_hpc.phases.credit import CreditOptions
    from mas_hpc.phases.credit import credit as credit_run
    from mas_hpc.phases.credit_results import print_credit
    from mas_hpc.run import policy_version, reopen
    from mas_hpc.serving import serve

    options = CreditOptions(
        method=method, value=value, replays=replays, traces=traces, limit=limit, localizer=localizer, epsilon=epsilon,
        resamples=resamples, pairs=pairs, base=base, reward_model=reward_model, seed=seed,
    )  # fmt: skip
    with connected(World.from_env()) as world:
        console = Console(quiet=not world.is_first, soft_wrap=True)
        run = serve(reopen(folder, world, console), policy_version(folder))
        results = credit_run(run, options)
        print_credit(console, results, folder)
        _report(run)


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


def _load(file: Path, overrides: list[str] | None) -> RunConfig:
    from mas_hpc.config_file import load_config

    return load_config(file, overrides or [])


def _trainable(config: RunConfig) -> RunConfig:
    from mas_hpc.errors import ConfigError

    if config.untrainable:
        raise ConfigError(config.untrainable)
    return config


def _playable(config: RunConfig, *, pipeline: bool = False) -> RunConfig:
    from mas_hpc.errors import ConfigError

    if config.unplayable:
        raise ConfigError(config.unplayable)
    if pipeline and config.method.kind in ("rm", "prm"):
        raise ConfigError(f"method.kind={config.method.kind}: a reward model plays no episodes to evaluate; use mas-hpc train")
    return config


def _with_run(config: RunConfig, job: Any, *, trains: bool = True, resume: Path | None = None) -> None:
    """Join the ranks, build the run and do the job; say where the traces are when it is interrupted."""
    from rich.console import Console

    from mas_hpc.distributed.world import World, connected
    from mas_hpc.run import build

    with connected(World.from_env()) as world:
        console = Console(quiet=not world.is_first, soft_wrap=True)
        run = build(config, world, console, resume, trains=trains)
        console.print(f"run folder: {run.folder}", highlight=False)
        try:
            job(run)
            run.close()
        except KeyboardInterrupt:
            console.print(f"interrupted; every finished trace is in {run.folder / 'traces'}", style="yellow")
            raise


def _finish(run: Run, rows: Any) -> None:
    from mas_hpc.phases import evaluation
    from mas_hpc.plan import print_results

    results = evaluation.write_results(run, rows)
    if run.world.is_first:
        print_results(run.console, results)
    _report(run)


def _report(run: Run) -> None:
    from mas_hpc.evaluation.report.build import build_report

    if run.world.is_first:
        run.console.print(f"report: {build_report(run.folder)}", highlight=False)


def main() -> None:
    """Entry point: a user's mistake is one message and exit 1, Ctrl-C is exit 130."""
    try:
        app(standalone_mode=True)
    except MasHpcError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except OSError as error:
        typer.secho(
            f"error: {error.filename or 'file'}: {error.strerror or error}; what was written before is intact",
            fg="red",
            err=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
