"""The nodes that a job was given, and which of them can be used: each runs a short check before any rank starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mas_hpc.distributed.supervisor_ranks import read_lines
from mas_hpc.errors import LaunchError
from mas_hpc.launch.evidence import named_hosts
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.staging import size_of

TIME_LIMIT_S = 120.0
"""For all nodes together; the launcher itself takes a minute of it on thousands."""
END_S = 5.0
"""That the launcher is given to end its processes, and its last words to arrive."""
TRIES = 3
"""Launches, each without the nodes that the one before has named."""
MIN_GIB = 1.0
UNPACKED = 4.0
"""Size of an archive and of what is unpacked from it, by that of the archive."""
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAY = '"$0" "$@" "${PALS_RANKID:-${SLURM_PROCID:-0}}" || exit 0'
"""Of a node whose check cannot start, silence is the answer: a code would end the others' checks."""


def allocated(plan: JobPlan, environment: Mapping[str, str]) -> list[str]:
    """Names of the job's nodes, in the scheduler's order, that of this program first.

    Raises LaunchError outside of a job, and for another number of nodes than the plan asked for.
    """
    hosts = list(dict.fromkeys(_listed(plan, environment)))
    if wrong := [host for host in hosts if not _HOST.fullmatch(host)]:
        raise LaunchError(f"{plan.name}: {wrong[0]!r} is no name of a node; look at the scheduler's list of nodes")
    if len(hosts) != plan.nodes:
        raise LaunchError(
            f"{plan.name}: {len(hosts)} nodes ({' '.join(hosts[:4])} ...), expected the {plan.nodes} that the job asked for; "
            "hand it in again with mas-hpc launch --submit"
        )
    return hosts


def _listed(plan: JobPlan, environment: Mapping[str, str]) -> list[str]:
    if plan.site.scheduler.kind == "pbs":
        file = environment.get("PBS_NODEFILE", "")
        if not file or not Path(file).is_file():
            raise LaunchError(f"PBS_NODEFILE={file!r}: no such file; this program runs inside a job of {plan.site.name}")
        return Path(file).read_text(encoding="utf-8").split()
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise LaunchError(f"SLURM_JOB_NODELIST is not set; this program runs inside a job of {plan.site.name}")
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"scontrol show hostnames {nodes}: {done.stderr.strip()}")
    return done.stdout.split()


def per_node_words(plan: JobPlan, hosts: Sequence[str], command: Sequence[str]) -> tuple[str, ...]:
    """The command that runs one process on each of these nodes; for PALS also writes their names to a file."""
    count = str(len(hosts))
    if plan.site.launcher.kind == "pals":
        file = plan.folder / "hosts_checked.txt"
        file.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
        return ("mpiexec", "-n", count, "--ppn", "1", "--hostfile", str(file), *plan.site.launcher.options, *command)
    if plan.site.launcher.kind == "srun":
        nodes = ("--nodes", count, "--ntasks", count, "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}")
        return ("srun", *nodes, "--kill-on-bad-exit=0", *command)
    raise LaunchError(f"{plan.name}: {plan.site.launcher.kind} starts nothing on nodes; use a site with pals or srun")


def preflight(plan: JobPlan, hosts: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with each node that cannot be used, by its name.

    Raises LaunchError when no node answers: then the fault is not in a node.
    """
    bad: dict[str, str] = {}
    for _ in range(TRIES):
        left = [host for host in hosts if host not in bad]
        output = _check(plan, left, environment)
        answers = dict(_answers(output))
        found = {host: "; ".join(answers[number]) for number, host in enumerate(left) if answers.get(number)}
        if answers:
            silent = {host: "the check did not start, or did not end" for n, host in enumerate(left) if n not in answers}
            return bad | found | silent
        named = named_hosts(output, left)
        if not named:
            break
        bad |= dict.fromkeys(named, "named by the launcher")
    last = " | ".join(output[-3:])
    raise LaunchError(f"{plan.name}: no node of {len(hosts)} answers: {last or 'no output'}")


def _check(plan: JobPlan, hosts: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Lines of output of the checks of all nodes, or as many as came in time."""
    node, device = plan.site.node, plan.site.tile.device
    program = (plan.python, "-m", "mas_hpc.launch.node_check")
    wanted = (node.scratch, f"{needed_gib(plan):.1f}", device, str(node.tiles // node.tiles_per_card))
    words = per_node_words(plan, hosts, ("/bin/sh", "-c", _SAY, *program, *wanted))
    process = subprocess.Popen(
        words, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    output: list[str] = []
    reader = read_lines(process, output.append)
    with suppress(subprocess.TimeoutExpired):
        process.wait(TIME_LIMIT_S)
    _end_group(process)
    reader.join(END_S)  # whoever left the launcher's group may keep the pipe open: nobody waits for that
    return list(output)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a launcher and what it has started: asked first, as it has processes on other nodes to end, and then not asked."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)


def _answers(lines: Sequence[str]) -> list[tuple[int, list[str]]]:
    """What nodes have printed: launchers glue lines of several nodes together now and then."""
    text = "\n".join(lines)
    places = [match.start() for match in re.finditer(r'\{"node": ', text)]
    found = [json.JSONDecoder().raw_decode(text, place)[0] for place in places]
    return [(answer["node"], answer["problems"]) for answer in found]


def needed_gib(plan: JobPlan) -> float:
    """Room for what is staged."""
    total = MIN_GIB
    for item in plan.stage:
        total += (UNPACKED if item.is_environment else 1.0) * size_of(item) / 2**30
    return total
