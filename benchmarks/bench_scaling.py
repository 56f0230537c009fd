"""How rollout, training and whole steps scale over ranks, and up to how many nodes the control plane does: scaling/README.md.

Run: python benchmarks/bench_scaling.py [all | ranks | control-plane] [--quick]
     python benchmarks/bench_scaling.py commands --site aurora --nodes 1 16 256 -- -A PROJECT --walltime 1:00:00 --submit
     python benchmarks/bench_scaling.py collect --runs RUNS_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling import control_plane, run

RANKS_PER_NODE = 12
"""Of Aurora."""


def main() -> None:
    """Measure here, or say how to on a site, or report what was run there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "ranks", "control-plane", "commands", "collect"), default="all")
    parser.add_argument("--quick", action="store_true", help="a little of everything: to see that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="of each timed run of ranks")
    parser.add_argument("--parts", nargs="+", default=list(control_plane.PARTS), choices=list(control_plane.PARTS))
    parser.add_argument("--nodes", nargs="+", type=int, default=list(control_plane.NODES))
    parser.add_argument("--store", type=Path, help="control_plane.json whose measurements of a store are used")
    parser.add_argument("--site", default="aurora")
    parser.add_argument("--ppn", type=int, default=RANKS_PER_NODE, help="ranks of a node, for commands")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="for collect")
    parser.add_argument("more", nargs="*", help="after --: overrides (ranks), or options of mas-hpc launch (commands)")
    arguments = parser.parse_args()
    if arguments.what in ("all", "ranks"):
        run.main(quick=arguments.quick, repeats=1 if arguments.quick else arguments.repeats, extra=arguments.more)
    if arguments.what in ("all", "control-plane"):
        control_plane.main(quick=arguments.quick, names=arguments.parts, nodes=arguments.nodes, store=arguments.store)
    if arguments.what == "commands":
        run.commands(arguments.site, arguments.nodes, arguments.ppn, arguments.more)
    if arguments.what == "collect":
        run.collect(arguments.runs)


if __name__ == "__main__":
    main()
