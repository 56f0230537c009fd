"""What sampling costs: tokens prefilled, shared, decoded and evicted, how full the batch was, and each agent's latency."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from statistics import fmean

from rich.console import Console
from rich.table import Table

from mas_hpc.rollout.engine import RolloutStats
from mas_hpc.types import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The work of the engines of some ranks for some episodes.

    Example: Account(stats=after - before, wall_s=2.5, num_ranks=1, max_rows=64, latencies={"solver": (0.2, 0.9)})
    """

    stats: RolloutStats
    """Sums over the ranks, but for peak_kv_bytes: that of the rank that held most."""
    wall_s: float
    """From the first request to the last answer, on the rank that counts."""
    num_ranks: int
    """Whose work is in it: ranks that died are not."""
    max_rows: int
    """Rows that one engine decodes at most."""
    latencies: Mapping[str, tuple[float, ...]]
    """Seconds from request to answer of every turn, by agent."""

    def then(self, later: Account) -> Account:
        """Both, one after the other."""
        agents = dict.fromkeys([*self.latencies, *later.latencies])
        return replace(
            self, stats=_with_peak(self.stats + later.stats, [self.stats, later.stats]), wall_s=self.wall_s + later.wall_s,
            num_ranks=min(self.num_ranks, later.num_ranks),
            latencies={name: self.latencies.get(name, ()) + later.latencies.get(name, ()) for name in agents},
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """rollout/* and, by agent, latency/* and latency_p95/*; shares of nothing are left out."""
        stats = self.stats
        counts = {
            "requests": stats.requests, "prompt_tokens": stats.prompt_tokens, "prefilled_tokens": stats.prefilled_tokens,
            "shared_tokens": stats.prompt_tokens - stats.prefilled_tokens, "decoded_tokens": stats.decoded_tokens,
            "evicted_tokens": stats.evicted_tokens, "peak_kv_bytes": stats.peak_kv_bytes, "wall_s": self.wall_s,
        }  # fmt: skip
        shares = {
            "padding_fraction": (stats.padded_keys, stats.padded_keys + stats.real_keys),
            "occupancy": (stats.row_steps, stats.steps * self.max_rows),
            "idle_fraction": (stats.idle_row_steps, stats.row_steps),
            "busy_fraction": (stats.wall_s, self.wall_s * self.num_ranks),
            "tokens_per_s": (stats.decoded_tokens, self.wall_s),
        }
        found = {f"rollout/{name}": float(count) for name, count in counts.items()}
        found |= {f"rollout/{name}": part / whole for name, (part, whole) in shares.items() if whole}
        found |= {f"latency/{agent}": fmean(seconds) for agent, seconds in self.latencies.items()}
        return found | {f"latency_p95/{agent}": percentile(seconds, 0.95) for agent, seconds in self.latencies.items()}


def latencies_of(traces: Iterable[Trace]) -> dict[str, tuple[float, ...]]:
    """Of every turn that was answered, by agent."""
    found: dict[str, list[float]] = defaultdict(list)
    for trace in traces:
        for turn in trace.turns:
            if turn.finish != "error":
                found[turn.agent].append(turn.wall_s)
    return {agent: tuple(seconds) for agent, seconds in found.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of the values do not exceed (nearest rank)."""
    return sorted(values)[ceil(share * len(values)) - 1]


def stats_to_json(stats: RolloutStats) -> str:
    """As ranks tell each other."""
    return json.dumps(asdict(stats))


def summed(texts: Sequence[str]) -> RolloutStats:
    """Several ranks' stats, as `stats_to_json` wrote them."""
    ranks = [RolloutStats(**json.loads(text)) for text in texts]
    total = RolloutStats()
    for stats in ranks:
        total += stats
    return _with_peak(total, ranks)


def _with_peak(total: RolloutStats, parts: Sequence[RolloutStats]) -> RolloutStats:
    return replace(total, peak_kv_bytes=max(part.peak_kv_bytes for part in parts))


def print_account(console: Console, account: Account) -> None:
    """A short table: tokens, batch, time and the agents' latency."""
    found = account.metrics()

    def count(name: str) -> str:
        return f"{found[f'rollout/{name}']:,.0f}"

    def share(name: str) -> str:
        value = found.get(f"rollout/{name}")
        return "-" if value is None else f"{value:.0%}"

    table = Table("rollout", "", title_justify="left", show_header=False)
    prompts = f"{count('prompt_tokens')}: {count('prefilled_tokens')} prefilled, {count('shared_tokens')} shared"
    table.add_row("prompt tokens", f"{prompts}, {count('evicted_tokens')} evicted")
    speed = f"{found['rollout/tokens_per_s']:,.0f} a second" if "rollout/tokens_per_s" in found else "-"
    table.add_row("decoded tokens", f"{count('decoded_tokens')}: {speed}")
    wasted = f"{share('idle_fraction')} finished rows, {share('padding_fraction')} padding"
    table.add_row("batch", f"{share('occupancy')} full, {wasted}")
    table.add_row("peak keys and values", f"{found['rollout/peak_kv_bytes'] / 2**20:,.1f} MiB a rank")
    ranks = f"{account.num_ranks} rank{'s' if account.num_ranks > 1 else ''}"
    table.add_row("time", f"{account.wall_s:.1f} s, engines of {ranks} busy {share('busy_fraction')}")
    for agent in account.latencies:
        table.add_row(f"latency of {agent}", f"{found[f'latency/{agent}']:.2f} s, p95 {found[f'latency_p95/{agent}']:.2f} s")
    console.print(table)
