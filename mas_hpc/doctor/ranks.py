"""mas-hpc doctor --mpi: all nodes of a job, and their ranks together. Every wait ends, and says who was waited for."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from mas_hpc import exits
from mas_hpc.distributed.device import Wanted
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.launchers import find_place
from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.probe import CollectiveTime, DeviceSpeed, measure_collectives, measure_device
from mas_hpc.distributed.transport import peers
from mas_hpc.distributed.watchdog import watching
from mas_hpc.distributed.weight_sync import WeightTransport
from mas_hpc.distributed.world import World, connected
from mas_hpc.doctor import trials
from mas_hpc.doctor.gather import Subject
from mas_hpc.doctor.node import examine
from mas_hpc.doctor.placement import RankPlace, check_places, place_of
from mas_hpc.errors import LaunchError, LostPeerError
from mas_hpc.launch.finding import STYLES, Finding, Verdict, as_records, as_table, worst

MEETING = timedelta(seconds=120)
"""Ranks come to a trial that far apart at most."""
HANG_S = 180.0
"""No trial takes so long: what hangs longer is ended by the watchdog, with the stacks of its threads."""
REPEATS = 3
TRANSPORTS: tuple[WeightTransport, ...] = ("group", "auto")
"""Gloo first: between hosts it is the one that is known to work."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What ranks have found so far; the same on all of them.

    Example: Report(findings=[Finding(name="FSDP2", verdict="ok", evidence="...")])
    """

    findings: list[Finding] = field(default_factory=list)
    places: list[RankPlace] = field(default_factory=list)
    collectives: tuple[CollectiveTime, ...] = ()
    speeds: list[DeviceSpeed] = field(default_factory=list)

    def to_json(self) -> str:
        """One JSON object."""
        times = [asdict(time) | {"bus_gb_per_s": time.bus_gb_per_s} for time in self.collectives]
        found: dict[str, Any] = {"verdict": worst(self.findings), "findings": as_records(self.findings)}
        found |= {"ranks": [asdict(place) for place in self.places], "collectives": times}
        return json.dumps(found | {"devices": [asdict(speed) for speed in self.speeds]}, indent=1)


def report_ranks(subject: Subject, device: Wanted, console: Console, *, as_json: bool) -> int:
    """Look, together with all ranks; the first prints. The exit code, the same for all. Collective.

    Raises LaunchError without a launcher that has started several ranks, and what `connected` raises. A rank that does not
    come to a trial ends all of them, with exits.LOST_PEER and its name.
    """
    place = find_place(subject.environment)
    if place is None or place.size == 1:
        raise LaunchError(
            "doctor --mpi: expected at least 2 ranks; start it as mpiexec -n 2 mas-hpc doctor --mpi, or as "
            "torchrun --nproc_per_node 2 -m mas_hpc doctor --mpi; of one node alone, without --mpi"
        )
    # Before MPI is there: to start programs beside an open fabric is not safe everywhere.
    own = examine(subject) if not place.local_rank else []
    with connected(World.from_env(), device) as world, watching(world, hang_s=HANG_S, stall_s=HANG_S) as world:
        report = Report()
        try:
            _look(world, subject, own if place.local_rank is not None or world.local_rank == 0 else [], report)
        except LostPeerError as error:
            remedy = "look at that rank's own error, and at its node; leave the node out"
            report.findings.append(Finding(name="ranks", verdict="error", evidence=str(error), remedy=remedy))
            _end(world, report, console, as_json=as_json)
        if world.is_first:
            _print(report, console, as_json=as_json)
        return exits.MISTAKE if worst(report.findings) == "error" else 0


def _end(world: World, report: Report, console: Console, *, as_json: bool) -> None:
    """Leave without the others: the group's own end would wait for the one that is lost."""
    if world.is_first:
        _print(report, console, as_json=as_json)
    if world.local_rank == 0:
        print(f"error: {report.findings[-1].evidence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exits.LOST_PEER)


def _look(world: World, subject: Subject, own: Sequence[Finding], report: Report) -> None:
    """Fill the report, trial by trial; `own` is what one rank of each node has found there."""
    _come(world, "placement")
    places = [json.loads(line) for line in gather_lines(world, [json.dumps(asdict(place_of(world)))])]
    report.places += [RankPlace(**place | {"cpus": tuple(place["cpus"])}) for place in places]
    report.findings += check_places(report.places, subject.site.node if subject.site.scheduler.kind != "none" else None)
    told = own if world.is_first else [finding for finding in own if finding.verdict in ("error", "warning")]
    said = [json.dumps([world.hosts[world.rank], record]) for record in as_records(told)]  # of 10,000 nodes, little
    by_host = [json.loads(line) for line in gather_lines(world, said)]
    report.findings += merge([(host, Finding(**record)) for host, record in by_host])
    _come(world, "waits")
    report.findings.append(trials.try_waits(world))
    _come(world, "collectives")
    report.collectives = measure_collectives(world, repeats=REPEATS)
    report.findings.append(trials.judge_collectives(report.collectives, world.device.type))
    _come(world, "speed")
    speed = measure_device(world, repeats=REPEATS)
    report.speeds += [DeviceSpeed(**json.loads(line)) for line in gather_lines(world, [json.dumps(asdict(speed))])]
    report.findings.append(trials.judge_speeds(report.speeds, world.hosts))
    _come(world, "FSDP2")
    report.findings.append(trials.try_sharded_step(world))
    for transport in TRANSPORTS:
        _come(world, f"weights {transport}")
        report.findings.append(trials.try_push(world, transport))
    _come(world, "leak")
    report.findings.append(trials.try_leak(world))


def _come(world: World, name: str) -> None:
    """Wait for all ranks before a trial. Raises LostPeerError naming those that do not come."""
    assert world.store is not None
    world.watch.at(f"doctor: {name}")
    arrive(world.store, f"doctor/{name}", world.rank)
    if missing := absent(world.store, f"doctor/{name}", world.size, MEETING):
        raise LostPeerError(f"{peers(world, missing)} did not come to {name} within {MEETING} of rank {world.rank}")


def merge(found: Sequence[tuple[str, Finding]]) -> list[Finding]:
    """All that the first host has found, and what is wrong on others: one finding a check and verdict, with its hosts.

    Example: merge([("a", ok), ("b", error), ("c", error)]) is the error, of b and c in the words of b, and ok
    """
    by_name: dict[str, list[tuple[str, Finding]]] = defaultdict(list)
    for host, finding in found:
        by_name[finding.name].append((host, finding))
    return [one for group in by_name.values() for verdict in STYLES if (one := _merged(group, verdict))]


def _merged(group: Sequence[tuple[str, Finding]], verdict: Verdict) -> Finding | None:
    """Of one check: what the hosts of that verdict say, in the words of the first."""
    chosen = [(host, finding) for host, finding in group if finding.verdict == verdict]
    if not chosen:
        return None
    first = chosen[0][1]
    if verdict in ("ok", "skipped"):
        return first
    return replace(first, evidence=f"{trials.shorten([host for host, _ in chosen])}: {first.evidence}")


def _print(report: Report, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(report.to_json(), flush=True)
        return
    if report.collectives:
        console.print(bandwidths(report.collectives))
    console.print(as_table(report.findings, f"{len(report.places)} ranks"))


def bandwidths(times: Sequence[CollectiveTime]) -> Table:
    """A row a collective: of each size the time, and what a link carries."""
    sizes = sorted({time.bytes for time in times})
    table = Table(title="collectives: time of the slowest rank, and what a link carries", title_justify="left")
    table.add_column("collective", no_wrap=True)
    for size in sizes:
        table.add_column(_size(size), justify="right", no_wrap=True)
    for name in dict.fromkeys(time.collective for time in times):
        own = {time.bytes: time for time in times if time.collective == name}
        table.add_row(name, *(f"{own[size].seconds * 1e3:.3f} ms\n{own[size].bus_gb_per_s:.3g} GB/s" for size in sizes))
    return table


def _size(num_bytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.4g} {name}"
    return f"{num_bytes} B"
