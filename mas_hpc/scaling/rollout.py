"""How long the rollout of a step takes: the roofline of decoding, and the ticket queue with lengths that have a long tail."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mas_hpc.scaling.load import Lengths, Load
from mas_hpc.scaling.machine import Machine
from mas_hpc.scaling.shape import ModelShape

SIMULATED_RANKS = 1024
"""Of more ranks so many are simulated, with their part of the work: of that many the slowest is near the limit of lengths."""
SUPPLY = 0.9
"""Part of its fair share that a rank takes, as mas_hpc.distributed.shared_tickets hands out work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Seconds of a step's rollout.

    Example: Rollout(seconds=42.0, mean_seconds=31.0, prefill_seconds=2.0, rows=12.5)
    """

    seconds: float
    """Until the last rank has nothing left."""
    mean_seconds: float
    """That a rank is busy, on average; the difference is the tail."""
    prefill_seconds: float
    """Of these, for prompts."""
    rows: float
    """Decoded together by a busy rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What one step of decoding costs: reading the weights and the keys and values, or the products if they take longer.

    Example: Roofline(weight_bytes=4e9, kv_bytes=2e7, flops=4e9, bytes_per_s=1e12, flops_per_s=1e14).step_s(rows=16)
    """

    weight_bytes: float
    kv_bytes: float
    """Of one row, at its mean length."""
    flops: float
    """Of one row."""
    bytes_per_s: float
    flops_per_s: float
    joined_s: Callable[[float], float] = lambda rows: 0.0
    """Seconds in which ranks that share layers bring together what each has of so many rows."""

    def step_s(self, rows: float) -> float:
        """Seconds in which so many rows get one token each."""
        own = max((self.weight_bytes + rows * self.kv_bytes) / self.bytes_per_s, rows * self.flops / self.flops_per_s)
        return own + self.joined_s(rows)


def predict_rollout(
    load: Load, lengths: Lengths, shape: ModelShape, machine: Machine, *, ranks: int, max_rows: int, size: int, split: int = 1
) -> Rollout:  # fmt: skip
    """Of a step on so many ranks that all have the model, or groups of `split` that share its layers and play as one.

    `size` is of a weight, in bytes; max_rows are decoded at once by one that plays.
    """
    if not load.turns:
        return Rollout(seconds=0.0, mean_seconds=0.0, prefill_seconds=0.0, rows=0.0)
    context = load.context + lengths.completion / 2
    ranks = max(1, ranks // split)

    def joined_s(rows: float) -> float:
        sums = machine.fabric.cost("all_reduce", rows * shape.width * size, split).times(2 * shape.layers + 1)
        return (sums + machine.fabric.cost("all_gather", rows * shape.vocabulary * size, split)).seconds

    roofline = Roofline(
        weight_bytes=shape.parameters * size / split, kv_bytes=context * shape.kv_values * size / split,
        flops=(2 * shape.parameters + 4 * shape.attention * context) / split, bytes_per_s=machine.memory_bytes_per_s,
        flops_per_s=machine.gemm_flops, joined_s=joined_s,
    )  # fmt: skip
    busy = min(ranks, load.units)
    simulated = min(busy, SIMULATED_RANKS)
    units = max(simulated, round(load.units * simulated / busy))
    jobs = sample_jobs(lengths, units, load.turns, load.siblings, np.random.default_rng(0))
    room = max(1, max_rows // load.siblings)
    ends, rows = play(jobs, simulated, room, lambda live: roofline.step_s(live * load.siblings))
    fresh = lengths.question + (load.turns - 1) * lengths.completion  # a prefix that was read before is kept
    prefill = 2 * shape.parameters * fresh * units / simulated / machine.gemm_flops / split
    mean = float(ends.mean()) * busy / ranks
    return Rollout(
        seconds=float(ends.max()) + prefill, mean_seconds=mean + prefill * busy / ranks, prefill_seconds=prefill,
        rows=rows * load.siblings,
    )  # fmt: skip


def sample_jobs(lengths: Lengths, units: int, turns: int, siblings: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Decoding steps of each unit: of every turn the longest sibling, as the next turn begins when all have ended."""
    shape = (units, turns, siblings)
    if lengths.observed:
        drawn = random.choice(np.asarray(lengths.observed, dtype=float), shape)
    else:
        location = np.log(lengths.completion) - lengths.sigma**2 / 2
        drawn = random.lognormal(location, lengths.sigma, shape)
    return np.clip(drawn, 1, lengths.limit).max(axis=2).sum(axis=1)


def play(
    jobs: NDArray[np.float64], ranks: int, room: int, step_s: Callable[[int], float]
) -> tuple[NDArray[np.float64], float]:  # fmt: skip
    """Hand the jobs out as ranks become free; (seconds until each rank has nothing left, mean jobs that a rank has under way).

    A step of a rank costs step_s(jobs under way) and brings each of them one step on.
    """
    waiting = list(jobs[::-1])
    live: list[list[float]] = [[] for _ in range(ranks)]  # heaps of how far each rank's clock of steps is when a job ends
    steps, finished = [0.0] * ranks, [0] * ranks
    ends, weighted, busy = np.zeros(ranks), 0.0, 0.0
    events = [(0.0, rank) for rank in range(ranks)]
    while events:
        now, rank = heapq.heappop(events)
        mine = live[rank]
        if mine:
            steps[rank] = heapq.heappop(mine)
            finished[rank] += 1
            while mine and mine[0] <= steps[rank]:
                heapq.heappop(mine)
                finished[rank] += 1
        share = max(len(jobs) / ranks - finished[rank], (len(waiting) + len(mine)) / ranks)
        wanted = min(len(waiting), int(np.ceil(SUPPLY * share)) - len(mine), room - len(mine))
        for _ in range(wanted):
            heapq.heappush(mine, steps[rank] + waiting.pop())
        ends[rank] = now
        if mine:
            lasts = (mine[0] - steps[rank]) * step_s(len(mine))
            weighted, busy = weighted + lasts * len(mine), busy + lasts
            heapq.heappush(events, (now + lasts, rank))
    assert not waiting, "a rank that is done leaves no work"
    return ends, weighted / busy if busy else 0.0
