"""mas-hpc launch with a site: show everything, or hand the job in."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mas_hpc.errors import LaunchError
from mas_hpc.launch.binding import binding_table
from mas_hpc.launch.checks import check_job, check_name, look_around
from mas_hpc.launch.environments import environment_table
from mas_hpc.launch.finding import Finding, as_table, worst
from mas_hpc.launch.plan import JobPlan, mpiexec_words
from mas_hpc.launch.render import render, submit_words
from mas_hpc.launch.request import Request, plan_job

SCRIPT = "job.sh"


def dry_run(request: Request, console: Console) -> int:
    """Print script, command, binding, environments and findings; nothing is written. The exit code: 1 for an error."""
    plan = plan_job(request)
    findings = check_job(plan, request.config, look_around(plan))
    is_legal = worst(findings) != "error"
    if plan.site.scheduler.kind != "none" and is_legal:
        console.print(f"{plan.folder / SCRIPT}:", highlight=False, style="bold")
        console.print(render(plan), highlight=False, markup=False, soft_wrap=True)
    console.print("command of the ranks:", highlight=False, style="bold")
    console.print(shlex.join(example_words(plan)), "\n", highlight=False, markup=False, soft_wrap=True)
    console.print(binding_table(plan))
    console.print(environment_table(plan))
    console.print(as_table(findings, "checks"))
    return 0 if is_legal else 1


def submit(request: Request, console: Console) -> int:
    """Write the job's folder, hand in the job and those chained to it, and print their ids.

    Raises LaunchError when a check finds an error, or the scheduler refuses; then nothing is left in the queue.
    """
    plan = plan_job(request)
    if plan.site.scheduler.kind == "none":
        raise LaunchError(f"--submit: {plan.site.name} has no scheduler; use --local -n {plan.num_ranks}")
    if len(plan.groups) > 1:
        raise LaunchError(
            "--submit with --engine-nodes: no rank of mas-hpc only serves; look at it with --dry-run, or leave it out"
        )
    findings = check_job(plan, request.config, look_around(plan))
    refuse(findings)
    if warnings := [finding for finding in findings if finding.verdict == "warning"]:
        console.print(as_table(warnings, "checks"))
    plan.write()
    script = plan.folder / SCRIPT
    script.write_text(render(plan), encoding="utf-8")
    console.print(f"job: {check_name(plan, request.config).evidence}", highlight=False, soft_wrap=True)
    console.print(f"jobs: {' '.join(hand_in(plan, script))}", highlight=False)
    console.print(f"job folder: {plan.folder}\nrun folder: {plan.run_dir}", highlight=False, soft_wrap=True)
    return 0


def refuse(findings: Sequence[Finding]) -> None:
    """Raises LaunchError naming every error among them."""
    if errors := [
        f"{finding.name}: {finding.evidence}; {finding.remedy}" for finding in findings if finding.verdict == "error"
    ]:
        raise LaunchError("\n".join(errors))


def hand_in(plan: JobPlan, script: Path) -> list[str]:
    """Ids of the job and of those that follow it. Raises LaunchError with what the scheduler says."""
    ids: list[str] = []
    for _ in range(plan.chain + 1):
        words = submit_words(plan, str(script), after=ids[-1] if ids else "")
        try:
            done = subprocess.run(words, cwd=plan.folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise LaunchError(f"{words[0]}: there is none here; submit on a login node of {plan.site.name}") from None
        if done.returncode:
            before = f"; {' '.join(ids)} are in the queue: remove them, or let them run" if ids else ""
            raise LaunchError(f"{shlex.join(words)}: {done.stderr.strip() or done.stdout.strip()}{before}")
        ids.append(done.stdout.strip())
    return ids


def example_words(plan: JobPlan) -> tuple[str, ...]:
    """The command with names in place of what only the job knows: its hosts, and a free port of the first one."""
    if plan.site.scheduler.kind == "none":
        return mpiexec_words(plan, ["localhost"], "", 0, 0)
    hosts = [f"HOST{number}" for number in range(plan.num_active)]
    return mpiexec_words(plan, hosts, f"{hosts[0]}{plan.site.host_suffix}", 29500, 0)
