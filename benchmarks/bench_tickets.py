"""What dynamic hand-out costs and gains: tickets of two real ranks over the supervisor's store, against fixed shares.

The peer is what most trainers do: rank r gets every size-th job, all at once, and one gather at the end collects the results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from reporting import ROOT, Row, alternate, cost_row, report

from mas_hpc import rollouts
from mas_hpc.config_file import load_config
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.supervisor_ranks import rank_environment
from mas_hpc.distributed.tickets import open_tickets
from mas_hpc.distributed.world import World, connected
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.run import build

RANKS = 2
PEER = "fixed shares, one gather"
WORD_JOBS, WORD_BYTES = 2000, 3000
EPISODES, ROWS = 128, 64
STEP_S, ROW_S = 2e-3, 2e-4
SLOWER = 1.5
STALL_S = 60.0
NOTES = {
    "ranks": "two processes and the store's host, a third, as mas-hpc launch starts them",
    "cpu_us": "CPU of ranks and host for a job's tickets and results (all ranks get all results), 3 kB a result",
    "wall_s": f"a model of decoding: a step of n rows sleeps {STEP_S * 1e3:g} ms + n x {ROW_S * 1e6:g} us; {EPISODES} episodes "
    f"of long-tailed length (log-normal, mean about 40, cap 256 steps), up to {ROWS} rows a rank, same lengths on both sides; "
    f"unequal: steps of rank 1 take {SLOWER:g} times as long, as on a core that is shared",
    "cpu_share": "a real rollout of the team of configs/quickstart.yaml, nothing trained: CPU spent in tickets and results by "
    "ranks and host, over all CPU of the ranks, against the 1% that is promised; the tiny model is the worst case",
}


# ---- what a rank measures, in a process of its own


def words(world: World, fixed: bool) -> dict[str, float]:
    """Hand out, hand in and read WORD_JOBS results; no work."""
    rng = random.Random(0)
    lines = [json.dumps([rng.random() for _ in range(WORD_BYTES // 20)]) for _ in range(WORD_JOBS)]
    start_s = time.process_time()
    if fixed:
        assert len(gather_lines(world, lines[world.rank :: world.size])) == WORD_JOBS
        return {"cpu_s": time.process_time() - start_s}
    tickets, live = open_tickets(world, "words", WORD_JOBS, stall_s=STALL_S), []
    while not tickets.exhausted:
        live += tickets.take(len(live), 64)
        if live:
            job = live.pop()
            tickets.finish(job, lines[job].encode())
        else:
            time.sleep(0.002)
    assert len(tickets.results()) == WORD_JOBS
    return {"cpu_s": time.process_time() - start_s}


class FixedShare:
    """Every size-th job, all at once."""

    def __init__(self, world: World, count: int) -> None:
        self._left = list(range(world.rank, count, world.size))
        self._unfinished = len(self._left)

    def take(self, live: int, room: int) -> list[int]:
        taken, self._left = self._left[:room], self._left[room:]
        return taken

    def finish(self, job: int, result: bytes) -> bool:
        self._unfinished -= 1
        return True

    @property
    def exhausted(self) -> bool:
        return self._unfinished == 0


def balance(world: World, fixed: bool) -> dict[str, float]:
    """Wall time until ranks of equal speed have played the modelled episodes; the mean over five draws of lengths."""
    return play_model(world, fixed, pace=1.0)


def unequal(world: World, fixed: bool) -> dict[str, float]:
    """The same when rank 1 is slower."""
    return play_model(world, fixed, pace=SLOWER if world.rank == 1 else 1.0)


def play_model(world: World, fixed: bool, *, pace: float) -> dict[str, float]:
    walls = []
    for seed in range(5):
        rng = random.Random(seed)
        lengths = [min(256, max(1, round(rng.lognormvariate(3.3, 0.9)))) for _ in range(EPISODES)]
        tickets: Any = FixedShare(world, EPISODES) if fixed else open_tickets(world, "balance", EPISODES, stall_s=STALL_S)
        dist.barrier()
        start_s, live = time.perf_counter(), {}
        while not tickets.exhausted:
            live |= {job: lengths[job] for job in tickets.take(len(live), ROWS - len(live))}
            time.sleep((STEP_S + len(live) * ROW_S) * pace)
            live = {job: left - 1 for job, left in live.items()}
            for job in [job for job, left in live.items() if left == 0]:
                del live[job]
                tickets.finish(job, b"")
        dist.barrier()
        walls.append(time.perf_counter() - start_s)
    return {"wall_s": statistics.mean(walls)}


class Metered:
    """Tickets whose CPU time is counted."""

    def __init__(self, tickets: Any) -> None:
        self._tickets, self.cpu_s = tickets, 0.0

    @contextmanager
    def _metering(self) -> Iterator[None]:
        start_s = time.process_time()
        yield
        self.cpu_s += time.process_time() - start_s

    def take(self, live: int, room: int) -> list[int]:
        with self._metering():
            return self._tickets.take(live, room)

    def finish(self, job: int, result: bytes) -> bool:
        with self._metering():
            return self._tickets.finish(job, result)

    @property
    def exhausted(self) -> bool:
        with self._metering():
            return self._tickets.exhausted

    def results(self) -> list[bytes]:
        with self._metering():
            return self._tickets.results()


def tiny(world: World, fixed: bool) -> dict[str, float]:
    """500 questions, up to 512 rows, the tiny model."""
    return rollout(world, "rollout.num_tasks=500")


def smollm2(world: World, fixed: bool) -> dict[str, float]:
    """16 questions, SmolLM2-135M."""
    return rollout(world, "model.path=smollm2", "data.num_test=16", "rollout.num_tasks=16")


def rollout(world: World, *overrides: str) -> dict[str, float]:
    """CPU of the tickets of a real rollout, and all of it."""
    from rich.console import Console

    opened: list[Metered] = []

    def open_metered(*arguments: Any, **options: Any) -> Metered:
        opened.append(Metered(open_tickets(*arguments, **options)))
        return opened[-1]

    with tempfile.TemporaryDirectory() as folder:
        changes = ["warm_start=null", "data.num_train=4", f"runs_dir={folder}", *overrides]
        config = load_config(ROOT / "configs" / "quickstart.yaml", changes)
        run = build(config, world, Console(quiet=True))
        rollouts.open_tickets = open_metered
        dist.barrier()
        start_s = time.process_time()
        how = rollouts.how_to_play(run, Sampling(temperature=1.0), 0)
        assert len(rollouts.play_all(run, run.test_tasks, how, label="rollout")) == len(run.test_tasks)
        total_s = time.process_time() - start_s
    return {"cpu_s": opened[0].cpu_s, "total_s": total_s, "jobs": len(run.test_tasks)}


MEASURES: dict[str, Callable[[World, bool], dict[str, float]]] = {
    "words": words,
    "balance": balance,
    "unequal": unequal,
    "tiny": tiny,
    "smollm2": smollm2,
}


# ---- what the parent does: host the store, start the ranks, add up


def on_ranks(name: str, *, fixed: bool) -> tuple[list[dict[str, float]], float]:
    """What each rank has measured, and the CPU of this process, which hosts the store, meanwhile."""
    host = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    command = [sys.executable, __file__, "--measure", name, *(["--fixed"] if fixed else [])]
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env=rank_environment(base, rank, RANKS, port=host.port, attempt=0), stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    start_s = time.process_time()
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(output.splitlines()[-1]) for output in outputs], time.process_time() - start_s


def cpu_us_per_job(*, fixed: bool) -> float:
    ranks, host_s = on_ranks("words", fixed=fixed)
    return (sum(rank["cpu_s"] for rank in ranks) + host_s) / WORD_JOBS * 1e6


def balance_row(case: str, measure: str, *, target: float) -> Row:
    """Wall time of the slower rank."""

    def wall_s(fixed: bool) -> float:
        return max(rank["wall_s"] for rank in on_ranks(measure, fixed=fixed)[0])

    ours, theirs = alternate([lambda: wall_s(False), lambda: wall_s(True)])
    return cost_row(case=case, metric="wall_s", ours=ours, peer=PEER, theirs=theirs, target=target)


def share_row(model: str, measure: str) -> Row:
    """Share of CPU that goes into tickets, the median of three rollouts."""
    shares, episodes_ms = [], []
    for _ in range(3):
        ranks, host_s = on_ranks(measure, fixed=False)
        total_s = sum(rank["total_s"] for rank in ranks)
        shares.append((sum(rank["cpu_s"] for rank in ranks) + host_s) / total_s)
        episodes_ms.append(total_s / ranks[0]["jobs"] * 1e3)
    case = f"rollout, {model}, {statistics.median(episodes_ms):.3g} ms CPU an episode"
    share = statistics.median(shares)
    return cost_row(case=case, metric="cpu_share", ours=share, peer="promise: below 1%", theirs=0.01, target=1.0)


def rows() -> Sequence[Row]:
    """All rows."""
    words_ours, words_theirs = alternate([lambda: cpu_us_per_job(fixed=False), lambda: cpu_us_per_job(fixed=True)])
    return [
        share_row("SmolLM2-135M", "smollm2"),
        share_row("tiny model", "tiny"),
        cost_row(case="a job without work", metric="cpu_us", ours=words_ours, peer=PEER, theirs=words_theirs, target=1.0),
        balance_row("long-tailed episodes, equal ranks", "balance", target=0.95),
        balance_row("long-tailed episodes, unequal ranks", "unequal", target=1.0),
    ]


def main() -> None:
    """Measure everything, or with --measure one thing as a rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=MEASURES)
    parser.add_argument("--fixed", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        with connected(World.from_env()) as world:
            print(json.dumps(MEASURES[arguments.measure](world, arguments.fixed)))
        return
    print(report("tickets", rows(), notes=NOTES).name)


if __name__ == "__main__":
    main()
