"""Copies of the environment and of models on every node: a tree over ssh in which who has them serves eight others at a time.

Over ssh, because ezpz measured it so on Aurora (70 s for 8 nodes, 421 s for 2,048; docs/cli/yeet.md) and because a node that
fails costs itself alone: under one mpiexec it would end the copies of all.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import floor
from pathlib import Path

from mas_hpc.errors import LaunchError
from mas_hpc.launch.plan import JobPlan, Staged
from mas_hpc.launch.staging_script import SSH, fetch_words, send_words

FAN_OUT = 8
TRIES = 3
"""Sources that a node asks, one after the other."""
MAX_LATE = 2
"""Of these tries, those that may run into the time limit: the second tells a node that hangs from a source that does."""
LEAST_S = 180.0
"""Of every time limit: to connect, unpack and import."""
SLOWEST_MB_PER_S = 50.0
"""Of a copy from node to node, sums included, while its source serves seven others; slower ones are given up."""
END_S = 5.0
"""That a command which is out of time is given to end by itself."""
MAX_CLIENTS = 512
"""Of ssh, on the node of this program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of a command, or of all that stage on a node.

    Example: Result(why="ssh: connect to host nodec port 22: Connection timed out")
    """

    why: str = ""
    """What went wrong, in its own words; empty when nothing did."""
    is_late: bool = False
    """Whether it was ended at its time limit."""
    output: str = ""


Send = Callable[[str, str], Awaitable[Result]]
"""Copies everything from a node to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimit:
    """How long a copy may take, by its size.

    Example: str(TimeLimit(size_bytes=10**9)) == "200 s (180 s and 1.0 GB at 50 MB/s)"
    """

    size_bytes: int

    @property
    def seconds(self) -> float:
        """Of one item, to one node."""
        return LEAST_S + self.size_bytes / (SLOWEST_MB_PER_S * 1e6)

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s ({LEAST_S:.0f} s and {self.size_bytes / 1e9:.1f} GB at {SLOWEST_MB_PER_S:.0f} MB/s)"


def stage(plan: JobPlan, hosts: Sequence[str], here: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Copy what is to be staged to all hosts; what went wrong on each host that has to be left out.

    The first host copies from the source, over ssh unless it is `here`. Raises LaunchError when that fails, and when fewer
    hosts have a copy than the job needs and than the share plan.stage_threshold: then the fault is not in a node or two.
    """
    if not plan.stage:
        return {}
    lost = asyncio.run(_stage(plan, hosts, here, environment))
    num_good = len(hosts) - len(lost)
    if num_good < min(plan.num_active, floor(plan.stage_threshold * len(hosts))):
        first, why = next(iter(lost.items()))
        raise LaunchError(
            f"{plan.name}: staged on {num_good} of {len(hosts)} nodes; the job needs {plan.num_active}, and with "
            f"stage_threshold={plan.stage_threshold:g} so many failures are no fault of nodes; the first, {first}: {why}"
        )
    return lost


async def _stage(plan: JobPlan, hosts: Sequence[str], here: str, environment: Mapping[str, str]) -> dict[str, str]:
    mounts = tuple(plan.site.scheduler.mounts)
    root, *others = hosts
    limits = {item: TimeLimit(size_bytes=size_of(item)) for item in plan.stage}
    digests = dict[Staged, str]()
    for item in plan.stage:
        words = fetch_words(item, mounts)
        done = await _run(words if root == here else (*SSH, root, shlex.join(words)), limits[item], environment)
        if done.why:
            raise LaunchError(f"{plan.name}: staging {item.source} fails on the first node, {root}: {done.why}")
        digests[item] = done.output.strip()
    clients = asyncio.Semaphore(MAX_CLIENTS)

    async def send(source: str, target: str) -> Result:
        async with clients:
            for item in plan.stage:
                words = send_words(item, target, digests[item], mounts)
                done = await _run(words if source == here else (*SSH, source, shlex.join(words)), limits[item], environment)
                if done.why:
                    return done
        return Result()

    return await spread(root, others, send)


async def spread(root: str, hosts: Sequence[str], send: Send) -> dict[str, str]:
    """Send from the root, and from everyone who has it, to all hosts; the last failure of each that has it not.

    Whose fault a failure was nobody knows, so it costs the source one of the eight that it serves at a time, the root none: a
    bad source soon serves nobody, and a bad host does not use up the good ones.
    """
    free: asyncio.Queue[str] = asyncio.Queue()
    for _ in range(FAN_OUT):
        free.put_nowait(root)

    async def fetch(host: str) -> str:
        done, num_late = Result(), 0
        for _ in range(TRIES):
            source = await free.get()
            done = await send(source, host)
            if not done.why or source == root:
                free.put_nowait(source)
            if not done.why:
                for _ in range(FAN_OUT):
                    free.put_nowait(host)
                return ""
            num_late += done.is_late
            if num_late == MAX_LATE:
                break
        return done.why

    results = await asyncio.gather(*(fetch(host) for host in hosts))
    return {host: why for host, why in zip(hosts, results, strict=True) if why}


async def _run(words: Sequence[str], limit: TimeLimit, environment: Mapping[str, str]) -> Result:
    """Do a command, and end it with all that it has started when its time is over."""
    process = await asyncio.create_subprocess_exec(
        *words, env=dict(environment), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    talk = asyncio.ensure_future(process.communicate())
    done, _ = await asyncio.wait({talk}, timeout=limit.seconds)
    if not done:
        await _end_group(process, talk)
        return Result(why=f"not done within {limit}", is_late=True)
    output, said = talk.result()
    lines = said.decode(errors="replace").strip().splitlines()
    why = (lines[-1] if lines else f"exit code {process.returncode}") if process.returncode else ""
    return Result(why=why, output=output.decode(errors="replace"))


async def _end_group(process: asyncio.subprocess.Process, talk: asyncio.Future[tuple[bytes, bytes]]) -> None:
    """Ask, so that half a copy is removed, and then force; whoever has left the group is not waited for."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, number)
        await asyncio.wait({talk}, timeout=END_S)
    talk.cancel()


def size_of(item: Staged) -> int:
    """Bytes of the source."""
    source = Path(item.source)
    files = [file for file in source.rglob("*") if file.is_file()] if source.is_dir() else [source]
    return sum(file.stat().st_size for file in files if file.exists())
