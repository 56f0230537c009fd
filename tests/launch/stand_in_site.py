"""A machine of stand-ins: PBS, PALS, modules and ssh of the folder stand_ins, whose nodes are all this host."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mas_hpc.data import trace_store
from mas_hpc.launch.outcome import Outcome
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.site import Profile, Site, load_site

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).with_name("stand_ins")
NODES = ("localhost", "nodeb", "nodec", "noded")
TIMEOUT_S = 400.0
CONFIG = """
model: {hidden_size: 32, num_heads: 2}
data: {kind: ring, num_digits: 5, modulus: 4, num_train: 64, num_test: 64}
rollout: {max_new_tokens: 8, max_rows: 4, num_tasks: 64, stall_s: 16}
warm_start: {steps: 4, batch_size: 16, learning_rate: 3e-3}
method: {kind: at_grpo, steps: 8, tasks_per_step: 4, group_size: 4, learning_rate: 4e-4}
checkpoint: {every: 5}
distributed: {hang_s: 120}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a user submits from.

    Example: Machine(folder=tmp_path).submit("--nodes", "2")
    """

    folder: Path

    @property
    def home(self) -> Path:
        """Of the stand-ins."""
        return self.folder / "pbs"

    @property
    def environment(self) -> dict[str, str]:
        """Of the login node; jobs get little of it."""
        path = os.pathsep.join((str(STAND_INS), str(Path(sys.executable).parent), "/usr/local/bin:/usr/bin:/bin"))
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        return {**os.environ, "PATH": path, "STAND_IN": str(self.home), "STAND_IN_MPIEXEC": mpiexec}

    def plant(self, name: str, *hosts: str) -> None:
        """A fault of some hosts; see the stand-ins."""
        (self.home / name).write_text(" ".join(hosts), encoding="utf-8")

    def submit(self, *words: str, job: str = "rollout", nodes: int = 2) -> list[str]:
        """Ids of the jobs."""
        given = ("--job", job, "--nodes", str(nodes), "--ppn", "1", "--walltime", "1:00:00", "-A", "P", "--submit", *words)
        done = subprocess.run(
            [sys.executable, "-m", "mas_hpc", "launch", str(self.folder / "c.yaml"), "--site", str(self.folder / "site.yaml"),
             *given],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("jobs: ")).split()[1:]

    def end_of(self, job: str) -> tuple[int, str]:
        """Exit code and output of a job, once it has ended."""
        file = self.home / f"{job}.done"
        self.wait_for(file.exists, f"{job} did not end", job)
        return int(file.read_text()), self.output(job)

    def output(self, job: str) -> str:
        """What a job has said."""
        file = self.home / f"{job}.out"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def wait_for(self, condition: Callable[[], Any], what: str, job: str) -> None:
        """Until it holds."""
        end_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end_s, f"{what}: {self.output(job)}"
            time.sleep(0.1)

    def outcome(self, name: str = "run") -> Outcome:
        """Of the jobs of a run."""
        found = Outcome.read(self.folder / "runs" / f"{name}.job")
        assert found is not None
        return found

    def traces(self, name: str = "run") -> list[str]:
        """Tasks of a run that were played to their end: those that were interrupted are kept under another label."""
        files = sorted((self.folder / "runs" / name / "traces").glob("rollout*.jsonl"))
        traces = [trace for file in files for trace in trace_store.read(file)]
        return sorted(trace.task.id for trace in traces if trace.label == "rollout")


def machine(folder: Path, nodes: Sequence[str] = NODES) -> Machine:
    """With its site.yaml, c.yaml, and a scratch of each node."""
    (folder / "pbs").mkdir(parents=True)
    (folder / "pbs" / "nodes").write_text("\n".join(nodes), encoding="utf-8")
    (folder / "scratch").mkdir()
    for name in nodes[1:]:
        (folder / f"scratch@{name}").mkdir()
    (folder / "c.yaml").write_text(f"name: run\n{CONFIG}", encoding="utf-8")
    (folder / "site.yaml").write_text(site_in(folder).model_dump_json(), encoding="utf-8")
    return Machine(folder=folder)


def site_in(folder: Path) -> Site:
    """Aurora's, with one CPU tile a node and nodes that are this host."""
    aurora = load_site("aurora")
    core = aurora.bindings[0].model_copy(update={"ranks_per_node": 1, "cores": ("4",), "worker_cores": ()})
    sizes = {"tiles": 1, "tiles_per_card": 1, "nics": 0, "nics_by_core": False, "scratch": str(folder / "scratch")}
    kept = ("ZE_FLAT_DEVICE_HIERARCHY", "HF_HUB_OFFLINE", "PYTHONUNBUFFERED")
    return aurora.model_copy(
        update={
            "name": "stand-in", "host_suffix": "", "proxy": "", "bindings": (core,),
            "tile": aurora.tile.model_copy(update={"device": "cpu"}),
            "node": aurora.node.model_copy(update=sizes),
            "scheduler": aurora.scheduler.model_copy(update={"submit_from": (), "mounts": {}}),
            "common": Profile(set={name: aurora.common.set[name] for name in kept}),
            "profiles": {"trainer": Profile(set={"OF_THE_TRAINER": "two words"}, unset=("FI_PROVIDER",))},
        }
    )  # fmt: skip


def plan_in(folder: Path, **changes: Any) -> JobPlan:
    """A job of two nodes on that machine that nobody has submitted."""
    raw: dict[str, Any] = {
        "name": "run", "site": site_in(folder), "job": "rollout", "config": str(folder / "c.yaml"),
        "run_dir": str(folder / "runs/run"), "cwd": str(folder), "nodes": 2, "ranks_per_node": 1, "walltime_min": 60,
        "groups": ({"role": "trainer", "nodes": 2, "ranks_per_node": 1, "cores": ("4",)},), "python": sys.executable,
    }  # fmt: skip
    return JobPlan.model_validate(raw | changes)
