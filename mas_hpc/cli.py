"""mas-hpc <command>: a thin face over run.py and phases/. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mas_hpc import cli_machine, exits
from mas_hpc.cli_options import ConfigFile, Overrides, Resume, load

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mas_hpc.config import RunConfig
    from mas_hpc.distributed.world import World
    from mas_hpc.resume import Training
    from mas_hpc.run import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
ResumeTraining = Annotated[
    Path | None, typer.Option("--resume", help="folder of a run that was stopped: go on from a checkpoint", show_default=False)
]
ResumeStep = Annotated[
    int | None, typer.Option(min=1, help="checkpoint of that step; default: the newest whole one", show_default=False)
]
MayDiffer = Annotated[
    list[str] | None,
    typer.Option(help="key that may differ from the run's configuration; any number of them", show_default=False),
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

    print_plan(load(config, overrides))


@app.command(name="config")
def reference() -> None:
    """Print every knob with its type, default and meaning.

    Example: mas-hpc config | less
    """
    from mas_hpc.plan import print_knobs

    print_knobs()


@app.command()
def pipeline(
    config: ConfigFile, overrides: Overrides = None, resume: ResumeTraining = None, resume_step: ResumeStep = None,
    may_differ: MayDiffer = None,
) -> None:  # fmt: skip
    """Build, warm start, evaluate, train, evaluate again and report.

    Example: mas-hpc pipeline configs/quickstart.yaml seed=1
    """
    from mas_hpc.phases import evaluation, training

    def job(run: Run) -> None:
        training.check(run)
        run = training.warm_up(run)
        before = evaluation.evaluate_before(run)
        training.train(run)
        _finish(run, [*before, *evaluation.evaluate(run, "after")])

    training_job = _training("pipeline", resume, resume_step, may_differ)
    _with_run(_playable(_trainable(load(config, overrides)), pipeline=True), job, resume=resume, training=training_job)


@app.command()
def train(
    config: ConfigFile, overrides: Overrides = None, resume: ResumeTraining = None, resume_step: ResumeStep = None,
    may_differ: MayDiffer = None,
) -> None:  # fmt: skip
    """Run one method (method.kind) and save its weights.

    Example: mas-hpc train configs/at_grpo.yaml method.steps=20
    """
    from mas_hpc.phases import training

    def job(run: Run) -> None:
        training.check(run)
        training.train(training.warm_up(run))
        _report(run)

    training_job = _training("train", resume, resume_step, may_differ)
    _with_run(_trainable(load(config, overrides)), job, resume=resume, training=training_job)


@app.command()
def rollout(config: ConfigFile, overrides: Overrides = None, resume: Resume = None) -> None:
    """Run a team on questions and write its traces.

    Example: mas-hpc rollout configs/mas.yaml data.path=gsm8k/test.jsonl rollout.num_tasks=8
    """
    from mas_hpc.phases import evaluation, training

    def job(run: Run) -> None:
        evaluation.rollout(training.keep(training.warm_up(run)))
        _report(run)

    _with_run(_playable(load(config, overrides)), job, trains=False, resume=resume)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, resume: Resume = None) -> None:
    """Measure a team, or a single agent, and its equal-token controls on held-out questions.

    Example: mas-hpc evaluate configs/mas.yaml data.path=gsm8k/test.jsonl evaluation.num_tasks=20
    """
    from mas_hpc.phases import evaluation, training

    def job(run: Run) -> None:
        run = training.keep(training.warm_up(run))
        _finish(run, evaluation.evaluate(run, ""))

    _with_run(_playable(load(config, overrides)), job, trains=False, resume=resume)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder, such as runs/mas", show_default=False)],
    step: Annotated[int | None, typer.Option(min=1, help="default: the newest whole checkpoint", show_default=False)] = None,
    to: Annotated[Path | None, typer.Option(help="default: export/ in the run folder", show_default=False)] = None,
) -> None:
    """Write the weights of a checkpoint as Hugging Face and PEFT do, for model.path and adapters.path.

    Example: mas-hpc export runs/mas --step 40
    """
    from rich.console import Console

    from mas_hpc.phases.export import export as export_run

    console = Console(soft_wrap=True)
    console.print(f"exported: {export_run(folder, console, step=step, to=to)}", highlight=False)


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
    from mas_hpc.run import config_of, policy_version, reopen
    from mas_hpc.serving import serve

    options = CreditOptions(
        method=method, value=value, replays=replays, traces=traces, limit=limit, localizer=localizer, epsilon=epsilon,
        resamples=resamples, pairs=pairs, base=base, reward_model=reward_model, seed=seed,
    )  # fmt: skip
    config = config_of(folder)
    with connected(World.from_env(), config.distributed.device) as ranks, _watching(ranks, config) as world:
        console = Console(quiet=not world.is_first, soft_wrap=True)
        run = serve(reopen(folder, world, console), policy_version(folder))
        results = credit_run(run, options)
        print_credit(console, results, folder)
        _report(run)


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


def _training(job: str, resume: Path | None, step: int | None, may_differ: list[str] | None) -> Training:
    from mas_hpc.errors import ConfigError
    from mas_hpc.resume import Training

    if resume is None and (step is not None or may_differ):
        raise ConfigError("--resume-step and --may-differ say how to go on with a run: add --resume FOLDER")
    return Training(job=job, step=step, may_differ=tuple(may_differ or ()))


def _with_run(
    config: RunConfig, job: Any, *, trains: bool = True, resume: Path | None = None, training: Training | None = None
) -> None:  # fmt: skip
    """Join the ranks, build the run and do the job. The ranks of a run that was asked to end part as if it were done."""
    from mas_hpc.distributed.rank_logs import log_to_file
    from mas_hpc.distributed.world import World, connected
    from mas_hpc.errors import RunStopped

    stopped = False
    with connected(log_to_file(World.from_env()), config.distributed.device) as ranks:
        try:
            with _watching(ranks, config) as world:
                _in_folder(config, world, job, trains=trains, resume=resume, training=training)
        except RunStopped as stop:
            stopped = True
            if ranks.is_first:
                typer.echo(f"{stop}; --resume goes on from there")
    if stopped:
        raise typer.Exit(exits.NOT_FINISHED)


def _in_folder(
    config: RunConfig, world: World, job: Any, *, trains: bool, resume: Path | None, training: Training | None
) -> None:  # fmt: skip
    """Build the run and do the job; say where the traces are when it is interrupted."""
    from rich.console import Console

    from mas_hpc.errors import RunStopped
    from mas_hpc.resume import mark_finished
    from mas_hpc.run import build

    console = Console(quiet=not world.is_first, soft_wrap=True)
    run = build(config, world, console, resume, trains=trains, training=training)
    console.print(f"run folder: {run.folder}", highlight=False)
    try:
        job(run)
        run.close()
        if training:
            mark_finished(run.folder, world, training.job)
    except RunStopped:
        run.close()
        raise
    except KeyboardInterrupt:
        console.print(f"interrupted; every finished trace is in {run.folder / 'traces'}", style="yellow")
        raise
    finally:
        run.release()


def _watching(world: World, config: RunConfig) -> AbstractContextManager[World]:
    from mas_hpc.distributed.watchdog import watching

    return watching(world, hang_s=config.distributed.hang_s, stall_s=config.rollout.stall_s)


def _finish(run: Run, rows: Any) -> None:
    from mas_hpc.phases import evaluation
    from mas_hpc.plan import print_results

    results = evaluation.write_results(run, rows)
    if run.world.is_first:
        print_results(run.console, results)
    _report(run)


def _report(run: Run) -> None:
    from mas_hpc.evaluation.report.build import build_report

    run.world.watch.at("report")
    if run.world.is_first:
        run.console.print(f"report: {build_report(run.folder)}", highlight=False)


app.add_typer(cli_machine.app)


def main() -> None:
    """Entry point: an error that is no mistake of ours is one message; exit codes are those of exits.py."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    except Exception as error:  # noqa: BLE001 (the outermost: it ends the process, with a code)
        code = exits.exit_code(error)
        if code == exits.UNEXPECTED:
            traceback.print_exc()
        else:
            typer.secho(f"error: {exits.explain(error, code)}", fg="red", err=True)
        sys.exit(code)
