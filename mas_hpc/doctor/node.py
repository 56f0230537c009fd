"""mas-hpc doctor: all checks of this node."""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.console import Console

from mas_hpc import exits
from mas_hpc.distributed.launchers import find_place
from mas_hpc.doctor import hardware, software, surroundings
from mas_hpc.doctor.facts import Facts
from mas_hpc.doctor.gather import Subject, gather
from mas_hpc.errors import LaunchError
from mas_hpc.launch.finding import Finding, as_records, as_table, worst

CHECKS: tuple[Callable[[Facts], Finding], ...] = (*software.CHECKS, *hardware.CHECKS, *surroundings.CHECKS)


def examine(subject: Subject) -> list[Finding]:
    """All findings of this node, in the order of CHECKS. Raises what `gather` raises."""
    facts = gather(subject)
    return [check(facts) for check in CHECKS]


def report_node(subject: Subject, console: Console, *, as_json: bool) -> int:
    """Print the findings and return the exit code. Raises LaunchError where a launcher has started several ranks."""
    place = find_place(subject.environment)
    if place and (place.size or 1) > 1:
        raise LaunchError(
            f"doctor: rank {place.rank} of {place.size}, started by {place.launcher}: add --mpi, and ranks look together"
        )
    findings = examine(subject)
    if as_json:
        print(json.dumps({"verdict": worst(findings), "findings": as_records(findings)}, indent=1))
    else:
        console.print(as_table(findings, "this node"))
    return exits.MISTAKE if worst(findings) == "error" else 0
