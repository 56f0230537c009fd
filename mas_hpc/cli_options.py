"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mas_hpc.config import RunConfig

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration, such as configs/quickstart.yaml", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them", show_default=False)]
Resume = Annotated[
    Path | None, typer.Option(help="folder of a run that was stopped: play only what is missing there", show_default=False)
]
JobOption = Annotated[
    Literal["pipeline", "rollout", "train", "evaluate"] | None,
    typer.Option(
        help="what ranks do; default: train, or rollout for a configuration without method or training data", show_default=False
    ),
]
Starter = Annotated[
    Literal["torchrun", "mpiexec"],
    typer.Option("--with", help="on this host: torchrun: own processes, in the environment that it gives; mpiexec: MPI's"),
]
EngineNodes = Annotated[
    int, typer.Option(min=0, help="of the nodes, the last ones for engines alone: a plan to look at, for --dry-run")
]
Stage = Annotated[
    list[Path] | None,
    typer.Option(help="copied to every node first: the environment (.tar.gz), model folders", show_default=False),
]


def load(file: Path, overrides: list[str] | None) -> RunConfig:
    """The configuration of a file with overrides. Raises ConfigError."""
    from mas_hpc.config_file import load_config

    return load_config(file, overrides or [])
