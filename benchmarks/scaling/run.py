"""Weak and strong scaling of rollout, training and whole steps over ranks of this host, and whether all compute the same."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from reporting import ROOT, Row, commit, cost_row, host, table, versions
from rich.console import Console
from scaling.cases import START, Case, Found, Kind, Mode, launch_words, read_all, start_overrides

from mas_hpc.evaluation.report.plots import Panel, Series, draw

KINDS: tuple[Kind, ...] = ("rollout", "train", "step")
MODES: tuple[Mode, ...] = ("weak", "strong")
TARGET = 0.8
"""Least efficiency of ranks that have a core each."""
MAX_DIFFERENCE = 1e-5
"""Of the norm of a gradient, relative: float32, summed in another order."""
OVERSUBSCRIBED = (4, 8)
RESULTS = ROOT / "benchmarks" / "results"


# ---- running


def cases(*, quick: bool, repeats: int) -> list[Case]:
    """Timed ones for one and two ranks, and strong ones for what has to be equal under every starter and number of ranks."""
    timed = [
        Case(kind=kind, mode=mode, ranks=ranks, starter="torchrun", repeat=repeat)
        for repeat in range(repeats) for kind in KINDS for mode in MODES for ranks in (1, 2)
    ]  # fmt: skip
    equal = [("mpiexec", 2)] if quick else [("mpiexec", 2), *((start, n) for n in OVERSUBSCRIBED for start in STARTERS)]
    return timed + [Case(kind=kind, mode="strong", ranks=n, starter=start) for kind in KINDS for start, n in equal]


def start_words(case: Case) -> list[str]:
    """What starts its ranks here."""
    return [*STARTERS[case.starter], str(case.ranks)]


STARTERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"],
    "mpiexec": [str(Path(sys.executable).parent / "mpiexec"), "-n"],
}


def run(case: Case, runs: Path, *, most_ranks: int, extra: Sequence[str]) -> None:
    """Start a job and wait. Raises SystemExit with what it said when it fails."""
    module = ["-m", "mas_hpc"]
    python = module if case.starter == "torchrun" else [sys.executable, *module]
    words = [*start_words(case), *python, case.job, str(ROOT / "configs" / case.config)]
    _wait(case.name, [*words, *case.overrides(most_ranks=most_ranks, runs=runs), *extra, f"runs_dir={runs}"])


def warm_up(runs: Path) -> None:
    """Make the model that whole steps begin with."""
    words = [sys.executable, "-m", "mas_hpc", "train", str(ROOT / "configs" / "grpo.yaml"), *start_overrides()]
    _wait(START, [*words, f"runs_dir={runs}"])


def _wait(name: str, words: Sequence[str]) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    }  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}: {shlex.join(words)}\n{done.stderr[-3000:]}")


# ---- comparing


def efficiency(kind: Kind, mode: Mode, seconds: Mapping[int, float]) -> dict[int, float]:
    """Of each number of ranks, against the least: the time that as much work a rank took there over what it takes here."""
    least = min(seconds)
    return {
        ranks: seconds[least] / taken / (ranks / least if mode == "strong" else 1.0) for ranks, taken in sorted(seconds.items())
    }  # fmt: skip


def efficiencies(found: Sequence[Found]) -> dict[tuple[Kind, Mode, str], dict[int, float]]:
    """By kind, mode and starter, from medians over repeats."""
    times: dict[tuple[Kind, Mode, str], dict[int, list[float]]] = {}
    for one in found:
        of_case = times.setdefault((one.case.kind, one.case.mode, one.case.starter), {})
        of_case.setdefault(one.case.ranks, []).append(one.seconds)
    return {
        key: efficiency(key[0], key[1], {ranks: median(some) for ranks, some in by_ranks.items()})
        for key, by_ranks in times.items() if len(by_ranks) > 1
    }  # fmt: skip


def efficiency_rows(found: Sequence[Found], *, cores: int) -> list[Row]:
    """One a number of ranks beyond the least; ranks that share cores have nothing to hold."""
    return [
        Row(
            case=f"{kind}, {mode}, {ranks} ranks, {starter}", metric="efficiency", ours=value, peer=f"{min(by_ranks)} ranks",
            theirs=1.0, ratio=value, target=TARGET if starter not in STARTERS or ranks <= cores else 0.0,
        )
        for (kind, mode, starter), by_ranks in efficiencies(found).items()
        for ranks, value in by_ranks.items() if ranks > min(by_ranks)
    ]  # fmt: skip


def equal_rows(found: Sequence[Found]) -> list[Row]:
    """Strong runs do the same work: gradients and sampled tokens against those of the fewest ranks."""
    rows = []
    for kind in KINDS:
        runs = sorted(
            (one for one in found if (one.case.kind, one.case.mode) == (kind, "strong")), key=lambda one: one.case.ranks
        )
        for one in runs[1:]:
            if one.case.repeat == 0:
                rows.append(_equal_row(one, runs[0]))
    return rows


def _equal_row(one: Found, first: Found) -> Row:
    case = f"{one.case.kind}, {one.case.ranks} ranks, {one.case.starter}"
    if one.case.kind == "rollout":
        same = sum(one.traces.get(task) == tokens for task, tokens in first.traces.items())
        share = same / len(first.traces) if one.traces.keys() == first.traces.keys() else 0.0
        peer = f"{first.case.ranks} rank, same tokens"
        return Row(case=case, metric="equal traces", ours=share, peer=peer, theirs=1.0, ratio=share, target=1.0)
    before, after = first.grad_norms[0], one.grad_norms[0]
    if not before:
        raise SystemExit(f"{first.case.name}: its first gradient is zero, so nothing can be compared")
    off = abs(after - before) / before
    return cost_row(
        case=f"{case}, first step", metric="gradient off by", ours=max(off, 1e-12), peer=f"{first.case.ranks} rank",
        theirs=MAX_DIFFERENCE, target=1.0,
    )  # fmt: skip


def chart(found: Sequence[Found]) -> str:
    """Efficiency over ranks as SVG."""
    lines = efficiencies(found)
    series = tuple(
        Series(name=" ".join(key), colour=number % 6, points=tuple(by_ranks.items()))
        for number, (key, by_ranks) in enumerate(lines.items())
    )
    legend = "".join(f"<li class='c{one.colour}'>{one.name}</li>" for one in series)
    style = (ROOT / "mas_hpc" / "evaluation" / "report" / "style.css").read_text()
    drawn = draw(Panel(title="Efficiency over ranks", series=series, share=True))
    return f"<!doctype html><meta charset=utf-8><title>Scaling</title><style>{style}</style>{drawn}<ul>{legend}</ul>\n"


def report_found(name: str, found: Sequence[Found], *, notes: Mapping[str, str]) -> None:
    """Write results/<name>.json and .html, print the rows."""
    rows = [*equal_rows(found), *efficiency_rows(found, cores=os.cpu_count() or 1)]
    document = {
        "host": host(), "versions": versions(), "commit": commit(), "notes": dict(notes),
        "runs": [{**asdict(one.case), "seconds": one.seconds, "grad_norms": one.grad_norms} for one in found],
        "rows": [asdict(row) | {"holds": row.holds} for row in rows],
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{name}.html").write_text(chart(found), encoding="utf-8")
    Console(width=140).print(table(name, rows))


def main(*, quick: bool, repeats: int, extra: Sequence[str]) -> None:
    """Run all cases here, timed ones so often, and report; `extra` overrides apply to all of them."""
    todo = cases(quick=quick, repeats=repeats)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder))
        for case in todo:
            run(case, Path(folder), most_ranks=2 if quick else max(OVERSUBSCRIBED), extra=extra)
            print(case.name, flush=True)
        found = read_all(Path(folder))
    notes = {
        "efficiency": "weak: seconds of one rank over those of n with n times the work; strong: the same work, over n as well",
        "repeats": f"{repeats}; medians",
        "load": f"{load[0]:.1f} before, {os.getloadavg()[0]:.1f} after (one minute)",
        "extra": " ".join(extra),
    }
    report_found("scaling-quick" if quick else "scaling", found, notes=notes)


def collect(runs: Path) -> None:
    """Report on runs that a site has made."""
    report_found(f"scaling-{runs.name}", read_all(runs), notes={"runs": runs.name})


def commands(site: str, nodes: Sequence[int], ranks_per_node: int, options: Sequence[str]) -> None:
    """Print the commands that run all cases on a site, after the one that makes the model they begin with."""
    print(shlex.join(["mas-hpc", "train", "configs/grpo.yaml", *start_overrides()]))
    for kind in KINDS:
        for mode in MODES:
            for count in nodes:
                case = Case(kind=kind, mode=mode, ranks=count * ranks_per_node, starter=site)
                print(
                    shlex.join(launch_words(case, most_ranks=max(nodes) * ranks_per_node, nodes=count, options=options))
                )  # fmt: skip
