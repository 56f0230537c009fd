"""The jobs whose scripts are kept in golden/, and how they are written: python -m tests.launch.golden_jobs writes them anew."""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mas_hpc.config import RunConfig
from mas_hpc.config_file import load_config
from mas_hpc.launch.binding import places
from mas_hpc.launch.command import example_words
from mas_hpc.launch.plan import Job, JobPlan
from mas_hpc.launch.render import render
from mas_hpc.launch.request import Request, plan_job
from mas_hpc.launch.site import load_site

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
WALLTIME = {1: "0:30:00", 16: "6:00:00", 256: "6:00:00", 2048: "12:00:00", 10000: "24:00:00"}
SPARES = {1: 0, 16: 0, 256: 2, 2048: 16, 10000: 100}
SHOWN_RANKS = 24


read_site = functools.cache(load_site)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A job on Aurora.

    Example: Case(nodes=16, ppn=12, tp=1, disaggregated=False).name == "0016x12_tp1_colocated"
    """

    nodes: int
    ppn: int
    tp: int
    disaggregated: bool
    job: Job = "train"
    walltime: str = ""

    @property
    def name(self) -> str:
        kind = "disaggregated" if self.disaggregated else "colocated"
        other = "" if self.job == "train" else f"_{self.job}"
        hour = "_1h" if self.walltime == "1:00:00" else ""
        return f"{self.nodes:05}x{self.ppn:02}_tp{self.tp}_{kind}{other}{hour}"


def product() -> Iterator[Case]:
    """All sizes, ranks a node, sharing of layers and roles: a node alone has one role."""
    for nodes, ppn, tp, apart in itertools.product(WALLTIME, (12, 6), (1, 2), (False, True)):
        if nodes > 1 or not apart:
            yield Case(nodes=nodes, ppn=ppn, tp=tp, disaggregated=apart)


KEPT = (
    Case(nodes=1, ppn=12, tp=1, disaggregated=False),
    Case(nodes=1, ppn=6, tp=2, disaggregated=False, job="rollout"),
    Case(nodes=16, ppn=12, tp=1, disaggregated=False),
    Case(nodes=16, ppn=12, tp=1, disaggregated=False, walltime="1:00:00"),
    Case(nodes=16, ppn=12, tp=2, disaggregated=True),
    Case(nodes=16, ppn=6, tp=1, disaggregated=False),
    Case(nodes=256, ppn=12, tp=1, disaggregated=False),
    Case(nodes=256, ppn=12, tp=1, disaggregated=True),
    Case(nodes=256, ppn=12, tp=2, disaggregated=False),
    Case(nodes=256, ppn=6, tp=2, disaggregated=False, job="evaluate"),
    Case(nodes=2048, ppn=12, tp=1, disaggregated=False),
    Case(nodes=2048, ppn=6, tp=2, disaggregated=True),
    Case(nodes=2048, ppn=12, tp=2, disaggregated=False, job="pipeline"),
    Case(nodes=10000, ppn=12, tp=1, disaggregated=False),
    Case(nodes=10000, ppn=12, tp=1, disaggregated=True),
    Case(nodes=10000, ppn=6, tp=1, disaggregated=False, job="rollout"),
)


def words_of(case: Case) -> tuple[str, ...]:
    """Of the configuration, as a user gives them."""
    return ("checkpoint.every=10", *((f"distributed.tensor_parallel={case.tp}",) if case.tp > 1 else ()))


def config_of(case: Case) -> RunConfig:
    """As many tasks a step and rollouts as there are ranks, and checkpoints."""
    ranks = case.nodes * case.ppn
    tasks = [f"method.tasks_per_step={ranks}", f"rollout.num_tasks={ranks}"]
    return load_config(ROOT / "configs/at_grpo.yaml", [*tasks, *words_of(case), "name=team"])


def request(case: Case) -> Request:
    base = Path("/flare/Team/work")
    return Request(
        config_file=Path("configs/at_grpo.yaml"), config=config_of(case), site=read_site("aurora"), job=case.job,
        python=base / "env/bin/python", cwd=base, overrides=words_of(case), nodes=case.nodes,
        walltime=case.walltime or WALLTIME[case.nodes], project="Team", ranks_per_node=case.ppn,
        spares=SPARES[case.nodes], stage=(base / "env.tar.gz",) if case.nodes >= 256 else (),
        engine_nodes=max(1, case.nodes // 4) if case.disaggregated else 0,
    )  # fmt: skip


def plan_of(case: Case) -> JobPlan:
    return plan_job(request(case))


def text_of(case: Case) -> str:
    """The script, and as comments below it the command of the ranks, a word a line, and where the first ones are."""
    plan = plan_of(case)
    words = [f"#   {shlex.quote(word)}" for word in example_words(plan)]
    rows = [
        f"#   rank {place.rank} host {place.node} cores {place.text} tiles {','.join(map(str, place.tiles))} NIC {place.nic} "
        f"{place.role}"
        for place in itertools.islice(places(plan), SHOWN_RANKS)
    ]
    return "\n".join((render(plan), "# The ranks are started by:", *words, "# First node of each group:", *rows, ""))


def main() -> None:
    for file in GOLDEN.glob("*.txt"):
        file.unlink()
    for case in KEPT:
        (GOLDEN / f"{case.name}.txt").write_text(text_of(case), encoding="utf-8")


if __name__ == "__main__":
    main()
