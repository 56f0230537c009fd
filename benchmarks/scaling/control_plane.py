"""Up to how many nodes one station keeps up with the control plane of all ranks, and where a tree has to replace the star.

The parts are the product's own code over a counted store; what a message costs its host is measured here, on a real TCPStore.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from reporting import ROOT, Row, commit, cost_row, host, versions
from rich.console import Console
from rich.table import Table
from scaling.loads import Level, Load, Network
from scaling.measure_store import Cost, Measured, fit, measure
from scaling.parts import PARTS, Part, levels
from scaling.simulation import Message, Process, Simulation, Station

NODES = (1, 4, 16, 64, 256, 1024, 2048, 4096, 10_000)
SHAPES: Mapping[str, tuple[int, ...]] = {"star": (), "tree 12": (12,), "tree 12 x 64": (12, 64)}
"""Fan-outs from the bottom: a station a node, and one for the nodes of a rack."""
ROUND_TRIP_S = 50e-6
"""Between two hosts over TCP: assumed, since none is published for Aurora's network. Only who asks one by one feels it."""
AGREES = 2.0
"""Factor within which a real store's rate and the simulated one are expected."""
FILE = ROOT / "benchmarks" / "results" / "control_plane.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One part at a number of nodes, in one shape: of the station that is nearest to its limit.

    Example: Outcome(part="notes", nodes=256, shape="star", level=Level(clients=3072), load=load, row=row)
    """

    part: str
    nodes: int
    shape: str
    level: Level
    load: Load
    row: Row
    """What binds, against its limit."""


def binding(part: Part, load: Load) -> tuple[str, float, float]:
    """The metric that is nearest to its limit: name, value, limit."""
    metrics = [
        ("took_s", load.took_s, part.took_s),
        ("delay_s", load.p99_s, part.delay_s),
        ("busy", load.utilisation, part.busy),
    ]
    return max((one for one in metrics if math.isfinite(one[2])), key=lambda one: one[1] / one[2])


def outcome(name: str, nodes: int, shape: str, load_of: Callable[[Level], Load]) -> Outcome:
    """The busiest station of all levels; what a burst takes is the sum over them, since one follows the other."""
    part = PARTS[name]
    found = [(level, load_of(level)) for level in levels(nodes, SHAPES[shape])]
    level, load = max(found, key=lambda one: (lambda metric: metric[1] / metric[2])(binding(part, one[1])))
    if math.isfinite(part.took_s):
        load = Load(**{**asdict(load), "took_s": sum(one.took_s for _, one in found)})
    metric, value, limit = binding(part, load)
    row = cost_row(
        case=f"{name} of {nodes} nodes, {shape}", metric=metric, ours=max(value, 1e-9), peer="limit", theirs=limit, target=1.0
    )
    return Outcome(part=name, nodes=nodes, shape=shape, level=level, load=load, row=row)


def outcomes(network: Network, name: str, nodes: Sequence[int]) -> list[Outcome]:
    """A part at every number of nodes in every shape that differs; stations of the same level are simulated once."""
    load_of = cache(lambda level: PARTS[name].run(level, network))
    found = []
    for count in nodes:
        shapes = {tuple(levels(count, fan_out)): shape for shape, fan_out in reversed(SHAPES.items())}
        for shape in reversed(shapes.values()):
            found.append(outcome(name, count, shape, load_of))
            print(" | ".join(cells_of(found[-1])), flush=True)
    return found


def cells_of(one: Outcome) -> tuple[str, ...]:
    """As they are printed."""
    load, row = one.load, one.row
    verdict = "keeps up" if row.holds else f"{1 / row.ratio:.3g} x too much"
    return (
        one.part, f"{one.nodes}", one.shape, f"{one.level.clients}", f"{load.messages_per_s:.4g}", f"{load.utilisation:.3g}",
        f"{load.p99_s * 1e3:.3g}", f"{load.took_s:.3g}", f"{row.metric} {row.ours:.3g} of {row.theirs:g}", verdict,
    )  # fmt: skip


# ---- the simulation against a real store


def simulated_rate(measured: Measured, wake_s: float, *, num_words: int = 4000) -> float:
    """Words a second of clients that share one interpreter and one host, by the CPU times of both alone.

    wake_s: what a client waits beside those, before it sends and before it has the answer; 0 for words without one.
    """
    simulation = Simulation(round_trip_s=wake_s)
    host, clients = Station("host"), Station("clients")

    def client() -> Process:
        for _ in range(num_words // measured.clients):
            yield Message(clients, measured.client_s)
            yield Message(host, measured.host_s, measured.word != "set")

    for _ in range(measured.clients):
        simulation.start(client())
    return num_words / max(simulation.run(), host.free_s)


def agreement(rows: Sequence[Measured]) -> list[Row]:
    """Real rates against simulated ones, from two clients on; the wait of a round trip is what one client showed."""
    found = []
    for word in ("add", "set"):
        alone = next(row for row in rows if (row.word, row.clients) == (word, 1))
        wake_s = max(0.0, (1 / alone.words_per_s - alone.host_s - alone.client_s) / 2) if word == "add" else 0.0
        for row in (row for row in rows if row.word == word and row.clients > 1):
            simulated = simulated_rate(row, wake_s)
            off = max(simulated / row.words_per_s, row.words_per_s / simulated)
            case = f"store, {word}, {row.clients} clients, simulated {simulated:.0f}/s, real {row.words_per_s:.0f}/s"
            found.append(cost_row(case=case, metric="factor", ours=off, peer="agrees", theirs=AGREES, target=1.0))
    return found


# ---- the whole


def write(file: Path, measured: Sequence[Measured], cost: Cost, found: Sequence[Outcome], checks: Sequence[Row]) -> None:
    """All of it as JSON."""
    rows = [asdict(row) | {"holds": row.holds} for row in checks]
    for one in found:
        more = {"part": one.part, "nodes": one.nodes, "shape": one.shape, "clients": one.level.clients, **asdict(one.load)}
        rows.append(asdict(one.row) | {"holds": one.row.holds} | more)
    document = {
        "host": host(), "versions": versions(), "commit": commit(),
        "notes": {
            "ours": "of the station that is nearest to its limit, with 12 ranks a node; a row that does not hold breaks there",
            "round_trip_s": f"{ROUND_TRIP_S:g}, assumed",
            **{name: part.what for name, part in PARTS.items()},
        },
        "store": [asdict(row) for row in measured], "cost": asdict(cost), "rows": rows,
    }  # fmt: skip
    file.write_text(json.dumps(document, indent=1) + "\n")


def table(found: Sequence[Outcome]) -> Table:
    """Of all outcomes."""
    heads = ("part", "nodes", "shape", "clients", "messages/s", "busy", "p99 ms", "took s", "what binds", "verdict")
    result = Table(*heads, title="control plane, the busiest station")
    for one in found:
        result.add_row(*cells_of(one))
    return result


def read_store(file: Path) -> list[Measured]:
    """What an earlier run, perhaps on another machine, has measured of its store."""
    return [Measured(**row) for row in json.loads(file.read_text())["store"]]


def main(
    *, quick: bool = False, names: Sequence[str] = tuple(PARTS), nodes: Sequence[int] = NODES, store: Path | None = None,
) -> None:  # fmt: skip
    """Measure the store (or take the measurements of another result), simulate, write results/control_plane.json."""
    measured = read_store(store) if store else measure(num_words=1000 if quick else 8000)
    cost = fit([row for row in measured if row.clients == 8])
    network = Network(cost=cost, round_trip_s=ROUND_TRIP_S)
    checks = agreement(measured)
    for row in checks:
        print(f"{row.case}: {row.ours:.2f} x", flush=True)
    print(cost, flush=True)
    found: list[Outcome] = []
    for name in names:
        found += outcomes(network, name, nodes[:3] if quick else nodes)
        write(FILE.with_stem("control_plane-quick") if quick else FILE, measured, cost, found, checks)
    Console(width=160).print(table(found))
