"""Checkpoints and faults: how long a checkpoint takes, how often one pays, and what part of the time is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mas_hpc.scaling.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """Checkpoints on so many nodes.

    Example: Keeping(write_seconds=24.0, interval_seconds=1300.0, failures_per_hour=0.13, lost=0.04)
    """

    write_seconds: float
    interval_seconds: float
    """Of work between two checkpoints, at its best (Daly)."""
    failures_per_hour: float
    lost: float
    """Part of the wall time that is no progress: writing, work done twice, and starting again."""


def keeping_of(machine: Machine, nodes: int, num_bytes: float) -> Keeping:
    """With checkpoints of so many bytes; after a fault all ranks start again, on nodes that are staged."""
    write = num_bytes / machine.write_bytes_per_s
    between = machine.hours_between_failures * 3600 / nodes
    interval = daly_interval(write, between)
    return Keeping(
        write_seconds=write, interval_seconds=interval, failures_per_hour=3600 / between,
        lost=1 - 1 / wall_over_work(interval, write, machine.restart_s, between),
    )  # fmt: skip


def daly_interval(write_seconds: float, between_seconds: float) -> float:
    """Work between checkpoints that ends soonest: J. T. Daly, FGCS 22 (2006), equation 37, which adds two terms to Young's.

    sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d for d < 2 M, else M.
    """
    ratio = write_seconds / (2 * between_seconds)
    if ratio >= 1:
        return between_seconds
    young = math.sqrt(2 * write_seconds * between_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - write_seconds


def wall_over_work(interval: float, write: float, restart: float, between: float) -> float:
    """Wall time a second of work, with faults as a Poisson process (Daly, equation 20): M e^(R/M) (e^((t+d)/M) - 1) / t."""
    exponent = (interval + write) / between
    return math.inf if exponent > 700 else between * math.exp(restart / between) * math.expm1(exponent) / interval
