"""The script that a scheduler runs: a pure function of the plan. Templates hold no logic, and a user's words no shell."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mas_hpc.launch.checks import as_walltime
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.site import FOLDER

TEMPLATES = {"pbs": "pbs.sh.j2", "slurm": "slurm.sh.j2"}
SUBMIT = {"pbs": "qsub", "slurm": "sbatch"}


def render(plan: JobPlan) -> str:
    """The job's script. What stands in a scheduler's line is a plan.Word; all else is quoted for the shell."""
    template = _templates().get_template(TEMPLATES[plan.site.scheduler.kind])
    return template.render(_values(plan))


def submit_words(plan: JobPlan, script: str, after: str = "") -> tuple[str, ...]:
    """The command that hands the script in, to start when the job `after` has ended in any way."""
    kind = plan.site.scheduler.kind
    waits = {"pbs": ("-W", f"depend=afterany:{after}"), "slurm": (f"--dependency=afterany:{after}",)}
    ids_only = ("--parsable",) if kind == "slurm" else ()
    return (SUBMIT[kind], *ids_only, *(waits[kind] if after else ()), script)


def _values(plan: JobPlan) -> dict[str, Any]:
    site = plan.site
    return {
        "name": plan.name,
        "project": plan.project,
        "account": (plan.project,) if plan.project else (),
        "queue": plan.queue,
        "nodes": plan.nodes,
        "walltime": as_walltime(plan.walltime_min),
        "filesystems": ":".join(plan.filesystems),
        "cwd": plan.cwd,
        "modules": site.modules,
        "exports": (*sorted(site.common.set.items()), *_proxies(plan)),
        "unset": site.common.unset,
        "python": plan.python,
        "job_json": str(plan.folder / "job.json"),
    }


def _proxies(plan: JobPlan) -> tuple[tuple[str, str], ...]:
    """Never without what is reached past the proxy."""
    if not plan.site.proxy:
        return ()
    past = ",".join(plan.site.no_proxy)
    return ("http_proxy", plan.site.proxy), ("https_proxy", plan.site.proxy), ("no_proxy", past)


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,  # for a shell: quote does that
    )  # fmt: skip
    found.filters["quote"] = shlex.quote
    return found
