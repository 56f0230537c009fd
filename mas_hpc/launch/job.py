"""What a job's script starts on its first node: choose nodes, stage, and supervise the ranks until the run or the time is over.

Run: python -m mas_hpc.launch.job runs/NAME.job/job.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mas_hpc.distributed import supervisor
from mas_hpc.distributed.launchers import LOGS
from mas_hpc.distributed.supervisor import say
from mas_hpc.distributed.supervisor_ranks import Launch, MpiRanks, Start
from mas_hpc.distributed.supervisor_verdict import Ending
from mas_hpc.distributed.watchdog import STOP
from mas_hpc.errors import MasHpcError
from mas_hpc.exits import HUNG, MISTAKE, NOT_FINISHED
from mas_hpc.launch.evidence import lost_host, named_hosts, resolve, silent_host
from mas_hpc.launch.outcome import Outcome
from mas_hpc.launch.plan import JobPlan, mpiexec_words
from mas_hpc.launch.preflight import allocated, preflight
from mas_hpc.launch.staging import stage

END_S = 60.0
"""Before the end of the walltime ranks that were asked to end are ended: later the scheduler would, without a record."""
LOOK_S = 1.0
"""Time between two looks at whether ranks have to be asked to end."""
NUM_LINES = 1000
"""Last lines of the launcher's output that are searched for names of nodes."""


class Clock:
    """The time that a job has left.

    Example: Clock(walltime_min=60, signal_s=600).hurry() == ""
    """

    def __init__(self, walltime_min: int, signal_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s, self._signal_s = now_s, signal_s
        self._end_s = now_s() + 60.0 * walltime_min if walltime_min else float("inf")

    def hurry(self) -> Literal["", "ask", "end"]:
        """See supervisor_ranks.Nodes. Without time for a checkpoint nobody is asked."""
        left_s = self._end_s - self._now_s()
        if not self._signal_s or left_s > self._signal_s:
            return ""
        return "end" if left_s <= min(END_S, self._signal_s / 2) else "ask"


class JobNodes:
    """The nodes of a job, those with ranks and spares; see supervisor_ranks.Nodes."""

    def __init__(self, plan: JobPlan, hosts: Sequence[str], here: str, environment: Mapping[str, str], clock: Clock) -> None:
        """`hosts` can be used; ranks run on the first of them. `here` is the node of this program."""
        self._plan, self._here, self._environment, self._clock = plan, here, environment, clock
        self.active, self.spares = list(hosts[: plan.num_active]), list(hosts[plan.num_active :])
        self.dropped: dict[str, str] = {}
        self.first_attempt = len(list(plan.folder.glob("hosts_[0-9]*.txt")))
        self._lines: list[str] = []
        self._next_look = 0.0

    def start(self, what: Start) -> MpiRanks:
        """See Nodes: the launcher of the site starts them, on the nodes that the attempt's host file names."""
        plan = self._plan
        plan.hostfile(what.attempt).write_text("".join(f"{host}\n" for host in self.active), encoding="utf-8")
        words = mpiexec_words(plan, self.active, self._address, what.port, what.attempt, resume=self._is_there(what.attempt))
        self._lines.clear()
        return MpiRanks(words, {**self._environment, LOGS: str(plan.folder / "logs")}, plan.num_ranks, self._hear)

    def lost(self) -> bool:
        """See Nodes."""
        return bool(named_hosts(self._lines, self.active))

    def replace(self, ending: Ending) -> str:
        """See Nodes: those that the launcher, lost peers or silent ranks name, and those that do not pass their check again."""
        plan = self._plan
        bad = dict.fromkeys(named_hosts(self._lines, self.active), "the launcher lost its process there")
        if host := lost_host(ending.lost, self.active, lambda name: resolve(name + plan.site.host_suffix)):
            bad[host] = "its ranks closed their connections"
        if len(self.active) > 1 and (host := silent_host(ending.silent, self._host_of)):
            bad[host] = "its ranks gave no sign of life"
        bad |= preflight(plan, [host for host in (*self.active, *self.spares) if host not in bad], self._environment)
        for host, why in bad.items():
            say(f"node {host} is left out: {why}")
        self.dropped |= bad
        self.spares = [host for host in self.spares if host not in bad]
        for place, host in enumerate(self.active):
            if host in bad and not self.spares:
                return f"no node is left in place of {host}"
            if host in bad:
                self.active[place] = self.spares.pop(0)
        return ""

    def hurry(self) -> Literal["", "ask", "end"]:
        """See Nodes: ranks look for a file in the run's folder."""
        found, now_s = self._clock.hurry(), time.monotonic()
        if found and now_s >= self._next_look and Path(self._plan.run_dir).is_dir():
            self._next_look = now_s + LOOK_S
            Path(self._plan.run_dir, STOP).touch()
        return found

    @property
    def _address(self) -> str:
        """Of this program's store: its node's name on the fast network."""
        suffix = self._plan.site.host_suffix
        return f"{self._here.partition('.')[0]}{suffix}" if suffix else self._here

    def _host_of(self, rank: int) -> str:
        return self.active[rank // self._plan.ranks_per_node]

    def _is_there(self, attempt: int) -> bool:
        """Whether the run's folder has something to go on with; one that an attempt has only made is put aside."""
        folder = Path(self._plan.run_dir)
        if (folder / "config.yaml").is_file():
            return True
        if attempt and folder.is_dir():
            folder.rename(self._plan.folder / f"unfinished_{attempt}")
        return False

    def _hear(self, line: str) -> None:
        """What the launcher says, and the first rank: to the user, and to be searched for names of nodes."""
        print(line, flush=True)
        self._lines.append(line)
        del self._lines[:-NUM_LINES]


def run_job(plan: JobPlan, environment: Mapping[str, str], clock: Clock) -> int:
    """Do the job, or say why there is nothing to do; the exit code: 0, 1, HUNG, INTERRUPTED or NOT_FINISHED.

    Raises LaunchError where no node can be used, or too few got their copies of what is staged.
    """
    before = Outcome.read(plan.folder)
    if before and before.state in ("finished", "failed"):
        say(f"{plan.name}: {before.state} by job {before.job_id or '-'}; nothing is left to do")
        return 0 if before.state == "finished" else MISTAKE
    outcome = Outcome(state="running", job_id=environment.get("PBS_JOBID", environment.get("SLURM_JOB_ID", "")))
    outcome.write(plan)
    try:
        code, dropped = _supervised(plan, environment, clock)
    except MasHpcError:
        outcome.model_copy(update={"state": "failed"}).write(plan)
        raise
    state = "finished" if code == 0 else "failed" if code in (MISTAKE, HUNG) else "not finished"
    outcome.model_copy(update={"state": state, "dropped": dropped}).write(plan)
    Path(plan.run_dir, STOP).unlink(missing_ok=True)
    say(f"{plan.name}: {state}; run folder {plan.run_dir}, output of ranks {plan.folder / 'logs'}")
    return code


def _supervised(plan: JobPlan, environment: Mapping[str, str], clock: Clock) -> tuple[int, dict[str, str]]:
    """Exit code, and the nodes that were left out."""
    hosts = allocated(plan, environment)
    dropped = preflight(plan, hosts, environment)
    if len(hosts) - len(dropped) >= plan.num_active:
        dropped |= stage(plan, [host for host in hosts if host not in dropped], hosts[0], environment)
    for host, why in dropped.items():
        say(f"node {host} is left out: {why}")
    left = [host for host in hosts if host not in dropped]
    if len(left) < plan.num_active:
        remedy = f"--spares {len(dropped)} or more"
        say(f"error: {len(left)} nodes of {len(hosts)} can be used, {plan.num_active} are needed: {remedy}")
        return NOT_FINISHED, dropped
    nodes = JobNodes(plan, left, hosts[0], environment, clock)
    launch = Launch(
        job=plan.job, command=(plan.job,), ranks=plan.num_ranks, max_restarts=plan.max_restarts, starter="mpiexec"
    )  # fmt: skip
    return supervisor.launch(launch, nodes), dropped | nodes.dropped


def main() -> None:
    """Entry point: an error is one message, and its exit code is that of a mistake."""
    try:
        plan = JobPlan.read(Path(sys.argv[1]))
        sys.exit(run_job(plan, supervisor.user_environment(), Clock(plan.walltime_min, plan.signal_s)))
    except MasHpcError as error:
        say(f"error: {error}")
        sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
