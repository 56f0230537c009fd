"""What sampling cost, a row for each phase of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mas_hpc.evaluation.report.run_folder import MetricLine

KINDS = ("rollout", "latency", "latency_p95")
"""Metrics `<kind>/<name>` of phases.accounting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One phase: sums over its steps, but for shares and latencies, which are means, and the greatest peak.

    Example: Sampled(phase="rollout", requests=256.0, prompt_tokens=51_200.0, ..., agents=(("solver", 1.2, 3.4),))
    """

    phase: str
    requests: float
    prompt_tokens: float
    shared: float | None
    """Part of the prompt tokens whose keys and values were there already; None without prompts."""
    evicted_tokens: float
    decoded_tokens: float
    tokens_per_s: float | None
    occupancy: float | None
    """Rows that were decoded, as a part of rollout.max_rows."""
    wasted: float | None
    """Part of the attended keys that were padding."""
    peak_mib: float
    agents: tuple[tuple[str, float, float], ...]
    """Name, mean and 95th percentile of the latency in seconds."""


def sampled(lines: Sequence[MetricLine]) -> tuple[Sampled, ...]:
    """The phases that sampled, in order."""
    counted = [line for line in lines if "rollout/requests" in line.values]
    phases = dict.fromkeys(line.phase for line in counted)
    return tuple(_phase(phase, [line.values for line in counted if line.phase == phase]) for phase in phases)


def is_cost_alone(line: MetricLine) -> bool:
    """Whether nothing but the cost of sampling was measured: no step of a training."""
    return all(key.partition("/")[0] in KINDS for key in line.values)


def _phase(phase: str, steps: Sequence[dict[str, float]]) -> Sampled:
    def total(name: str) -> float:
        return sum(step.get(f"rollout/{name}", 0.0) for step in steps)

    def mean(key: str) -> float | None:
        return fmean(found) if (found := [step[key] for step in steps if key in step]) else None

    agents = dict.fromkeys(key.partition("/")[2] for step in steps for key in step if key.startswith("latency/"))
    prompt, wall_s = total("prompt_tokens"), total("wall_s")
    return Sampled(
        phase=phase, requests=total("requests"), prompt_tokens=prompt,
        shared=total("shared_tokens") / prompt if prompt else None,
        evicted_tokens=total("evicted_tokens"), decoded_tokens=total("decoded_tokens"),
        tokens_per_s=total("decoded_tokens") / wall_s if wall_s else None,
        occupancy=mean("rollout/occupancy"), wasted=mean("rollout/padding_fraction"),
        peak_mib=max(step.get("rollout/peak_kv_bytes", 0.0) for step in steps) / 2**20,
        agents=tuple((name, mean(f"latency/{name}") or 0.0, mean(f"latency_p95/{name}") or 0.0) for name in agents),
    )  # fmt: skip
