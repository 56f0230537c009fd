"""Episodes of a run: dealt out to ranks as they become free, kept on disk as they end, taken up after a restart, counted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mas_hpc.data import trace_store
from mas_hpc.distributed.notes import from_first, tell_first
from mas_hpc.distributed.tickets import Tickets, open_tickets
from mas_hpc.distributed.world import World
from mas_hpc.errors import MasHpcError, RolloutError, RunStopped
from mas_hpc.orchestration.collect import collect, origin_of
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.events import InOrder, Jobs
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.phases.accounting import Account, latencies_of, stats_to_json, summed
from mas_hpc.run import Run
from mas_hpc.types import Task, Trace, Turn

LEAVE_S = 10.0
"""Ranks leave a phase that far apart at most: a poll of their engines."""
SYNC_S = 1.0
"""Traces are forced to disk that often: once each would take longer than a small model needs to sample them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """All episodes of a phase, in the order of the tasks; and what they cost, on rank 0 over all ranks."""

    traces: list[Trace]
    account: Account


def how_to_play(run: Run, sampling: Sampling, seed: int, team: Team | None = None) -> Play:
    """Episodes of the run's team, or of a variation of it."""
    return Play(team=team or run.team, sampling=sampling, judge=run.judge, seed=seed)


def play_all(
    run: Run, tasks: Sequence[Task], how: Play, *, label: str, step: int = 0, keep: bool = True, bar: bool = True,
    starts: Sequence[Sequence[Turn]] = (),
) -> list[Trace]:  # fmt: skip
    """The traces of `play_counted`."""
    return play_counted(run, tasks, how, label=label, step=step, keep=keep, bar=bar, starts=starts).traces


def play_counted(
    run: Run, tasks: Sequence[Task], how: Play, *, label: str, step: int = 0, keep: bool = True, bar: bool = True,
    starts: Sequence[Sequence[Turn]] = (),
) -> Played:  # fmt: skip
    """Play `sampling.episodes` of each task on whichever ranks are free; all get all traces, in the order of the tasks.

    With `keep`, each trace goes to its rank's file under traces/ as soon as it ends, and a run that was restarted plays only
    what no file holds; without, only if the run is interrupted or fails before the caller has the traces. No collective: ranks
    meet in the store, so that those that are left finish the work of one that dies.
    """
    how = replace(how, step=step, label=label)
    run.world.watch.at(label, step)
    known = _known(run, tasks, how) if keep and run.resumes else {}
    left = [job for job in range(len(tasks) * how.sampling.episodes) if job not in known]
    file = run.folder / "traces" / f"{label}{f'.rank{run.world.rank}' if run.world.size > 1 else ''}.jsonl"
    keeper = _Keeper(file, at_once=keep)
    count = meter(run, label)
    fresh = run.led(lambda: _play_here(run, tasks, how, left, keeper, keep=keep, bar=bar, starts=starts), _to_text, _from_text)
    account = count([fresh[job] for job in sorted(fresh)])
    traces = known | fresh
    _tell_failures(run, label, list(fresh.values()))
    if keep and left and run.world.is_first:
        if account.num_ranks < run.players.size:
            _keep_lost(run, tasks, how, traces, file)
        run.log(label, step, account.metrics())
    return Played(traces=[traces[job] for job in sorted(traces)], account=account)


def _play_here(
    run: Run, tasks: Sequence[Task], how: Play, left: Sequence[int], keeper: _Keeper, *, keep: bool, bar: bool,
    starts: Sequence[Sequence[Turn]],
) -> dict[int, Trace]:  # fmt: skip
    """All ranks' traces of the jobs `left`, of which this one plays some; it keeps its own."""
    players, settings = run.players, run.config.rollout
    jobs = dealt(players, how.label, left, stall_s=settings.stall_s, encode=_to_line, decode=trace_store.from_json)
    jobs = _UntilAsked(jobs, run.world, how.label) if keep else jobs
    progress, advance = run.progress(how.label, -(-len(left) // players.size), shown=bar)

    def on_trace(trace: Trace) -> None:
        if keeper.take(trace):
            run.world.watch.kept()
        advance()

    live = max(1, settings.max_rows // how.sampling.group_size)
    try:
        with progress:
            collect(
                run.engine, tasks, how, max_live=live, schedule=settings.schedule, jobs=jobs, on_trace=on_trace, starts=starts
            )
    except (KeyboardInterrupt, MasHpcError):
        keeper.write_all()
        raise
    keeper.close()
    return jobs.results()


def _tell_failures(run: Run, label: str, traces: Sequence[Trace]) -> None:
    """Say why turns failed. Raises RolloutError when all did."""
    turns = [turn for trace in traces for turn in trace.turns]
    errors = [turn.error for turn in turns if turn.finish == "error"]
    if errors and len(errors) == len(turns):
        raise RolloutError(f"{label}: all {len(turns)} turns failed; the first: {errors[0]}")
    if errors:
        run.console.print(f"{label}: {len(errors)} of {len(turns)} turns failed; the first: {errors[0]}", style="yellow")


# ---- dealing out


class Dealt(Jobs, Protocol):
    """Jobs whose results all ranks get."""

    def results(self) -> dict[int, Any]:
        """By job, once exhausted. Ask once."""
        ...


class _Streamed:
    """Tickets as jobs: ticket number n is job `left[n]`, and results travel as bytes."""

    def __init__(
        self, tickets: Tickets, left: Sequence[int], encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]
    ) -> None:
        self._tickets, self._left = tickets, left
        self._number = {job: number for number, job in enumerate(left)}
        self._encode, self._decode = encode, decode

    def take(self, live: int, room: int) -> list[int]:
        return [self._left[number] for number in self._tickets.take(live, room)]

    def finish(self, job: int, result: Any) -> bool:
        return self._tickets.finish(self._number[job], self._encode(result))

    @property
    def exhausted(self) -> bool:
        return self._tickets.exhausted

    def results(self) -> dict[int, Any]:
        return {job: self._decode(result) for job, result in zip(self._left, self._tickets.results(), strict=True)}


class _UntilAsked:
    """Jobs of which none is taken once the run is asked to end: those that are finished are on disk."""

    def __init__(self, jobs: Dealt, world: World, label: str) -> None:
        self._jobs, self._watch, self._label = jobs, world.watch, label
        self.finish, self.results = jobs.finish, jobs.results

    def take(self, live: int, room: int) -> list[int]:
        return self._jobs.take(live, room)

    @property
    def exhausted(self) -> bool:
        """See Jobs. Raises RunStopped, here because every rank asks this, also one that has nothing to do."""
        if self._watch.is_asked_to_end and not self._jobs.exhausted:
            raise RunStopped(f"{self._label}: asked to end; every finished trace is kept")
        return self._jobs.exhausted


def dealt(
    world: World, label: str, left: Sequence[int], *, stall_s: float, encode: Callable[[Any], bytes],
    decode: Callable[[bytes], Any],
) -> Dealt:  # fmt: skip
    """The jobs `left`, the same on every rank, dealt out to the ranks. A rank that is alone keeps the results as they are."""
    if world.size == 1:
        return InOrder(left)
    return _Streamed(open_tickets(world, label, len(left), stall_s=stall_s), left, encode, decode)


def _to_line(trace: Trace) -> bytes:
    return trace_store.to_json(trace).encode()


def _to_text(traces: Mapping[int, Trace]) -> str:
    return "\n".join(f"{job} {trace_store.to_json(trace)}" for job, trace in traces.items())


def _from_text(text: str) -> dict[int, Trace]:
    numbered = (line.split(" ", 1) for line in text.split("\n") if line)
    return {int(job): trace_store.from_json(trace.encode()) for job, trace in numbered}


# ---- counting


def meter(run: Run, label: str) -> Callable[[Sequence[Trace]], Account]:
    """Start counting; the call returns what the engines have done since, for these traces.

    Ranks that serve together do the same work: it counts once, on those that lead.
    """
    start_s, before = time.perf_counter(), run.engine.stats

    def stop(traces: Sequence[Trace]) -> Account:
        wall_s = time.perf_counter() - start_s
        done = stats_to_json(run.engine.stats - before)
        told = tell_first(run.players, label, done, patience_s=LEAVE_S) if run.leads else {run.world.rank: done}
        return Account(
            stats=summed(list(told.values())), wall_s=wall_s, num_ranks=len(told), max_rows=run.config.rollout.max_rows,
            latencies=latencies_of(traces),
        )  # fmt: skip

    return stop


# ---- what is on disk


class _Keeper:
    """This rank's traces of a phase: appended to its file as they end, or held until somebody else has them."""

    def __init__(self, file: Path, *, at_once: bool) -> None:
        self._file, self._at_once = file, at_once
        self._held: list[Trace] = []
        self._synced_s, self._is_synced = -SYNC_S, True

    def take(self, trace: Trace) -> bool:
        """Append a trace, so that it outlives this rank; every SYNC_S, so that those before it outlive the host. Whether so."""
        if not self._at_once:
            self._held.append(trace)
            return False
        now_s = time.monotonic()
        self._is_synced = now_s - self._synced_s >= SYNC_S
        trace_store.write(self._file, [trace], sync=self._is_synced)
        self._synced_s = now_s if self._is_synced else self._synced_s
        return self._is_synced

    def write_all(self) -> None:
        """Append what is held, since nobody will have it."""
        if self._held:
            trace_store.write(self._file, self._held)

    def close(self) -> None:
        """Force to disk what was appended."""
        if not self._is_synced:
            trace_store.write(self._file, [])


def finished(folder: Path, tasks: Sequence[Task], how: Play) -> dict[int, Trace]:
    """Traces of these episodes that some rank has written, by job; an incomplete last line is noted and left out."""
    episodes = how.sampling.episodes
    jobs = {
        origin_of(task, repeat): number * episodes + repeat for number, task in enumerate(tasks) for repeat in range(episodes)
    }
    found: dict[int, Trace] = {}
    for part in trace_store.parts(folder, how.label):
        for trace in trace_store.read(part):
            job = jobs.get(_origin(trace)) if (trace.label, trace.step) == (how.label, how.step) else None
            if job is not None and trace.task == tasks[job // episodes]:
                found[job] = trace
    return found


def _origin(trace: Trace) -> str:
    """What the names of its own turns begin with; see collect.origin_of."""
    return trace.path[-1].id.rpartition("/")[0] + "/" if trace.path else ""


def _known(run: Run, tasks: Sequence[Task], how: Play) -> dict[int, Trace]:
    """What an earlier attempt has finished, as rank 0 finds it before any rank writes more."""
    found = finished(run.folder / "traces", tasks, how)
    patience_s = run.config.rollout.stall_s
    agreed = json.loads(from_first(run.world, f"{how.label}/known", json.dumps(sorted(found)), patience_s=patience_s))
    if agreed:
        total = len(tasks) * how.sampling.episodes
        run.console.print(f"{how.label}: {len(agreed)} of {total} traces are there from before the restart", highlight=False)
    return {job: found[job] for job in agreed}


def _keep_lost(run: Run, tasks: Sequence[Task], how: Play, traces: Mapping[int, Trace], file: Path) -> None:
    """Write what a rank has handed in, and died before it wrote it."""
    written = finished(run.folder / "traces", tasks, how)
    if lost := [traces[job] for job in sorted(traces) if job not in written]:
        trace_store.write(file, lost)
