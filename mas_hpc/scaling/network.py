"""What a collective costs: messages of a start-up time alpha and a time per byte beta, by how far apart the ranks are.

Formulas of Thakur, Rabenseifner, Gropp (2005), "Optimization of Collective Communication Operations in MPICH", and of Sanders,
Speck, Traff (2009) for two trees. V is what a rank has at the end (all_gather), or at the start (the others), in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mas_hpc.launch.site import Level, Link

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
Algorithm = Literal["ring", "rabenseifner", "double_tree", "hierarchical"]
CHOSEN: Mapping[Collective, Algorithm] = {
    "all_reduce": "rabenseifner", "all_gather": "ring", "reduce_scatter": "ring", "broadcast": "double_tree",
}  # fmt: skip
"""all_reduce and broadcast as the site's environment asks for (CCL_ALLREDUCE_SCALEOUT, CCL_BCAST); the growth that published
steps show with every rank is that of a ring."""


OVERLAP_POWER = 4
"""Of the norm that stands for the larger of two times; alike ones together take 1.19 times as long as each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of collectives, in two parts.

    Example: (Cost(start=0.01, transfer=0.5) + Cost(start=0.01, transfer=0.0)).seconds == 0.52
    """

    start: float
    """Seconds that grow with ranks; the host waits for them (CCL_OP_SYNC)."""
    transfer: float
    """Seconds that grow with bytes; passes can go on meanwhile."""

    @property
    def seconds(self) -> float:
        """With nothing beside it."""
        return self.start + self.transfer

    def __add__(self, other: Cost) -> Cost:
        return Cost(start=self.start + other.start, transfer=self.transfer + other.transfer)

    def times(self, count: float) -> Cost:
        """So many of them."""
        return Cost(start=count * self.start, transfer=count * self.transfer)

    def beside(self, passes: float) -> float:
        """Seconds of passes and of these between their layers: transfers are hidden as long as passes last.

        The longer of the two, rounded where they are alike: then neither hides the other quite.
        """
        return self.start + (passes**OVERLAP_POWER + self.transfer**OVERLAP_POWER) ** (1 / OVERLAP_POWER)


NOTHING = Cost(start=0.0, transfer=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Alpha and beta of one collective, as it was measured on so many ranks.

    Example: Fitted(latency_s=1e-4, s_per_byte=1e-9, ranks=2)
    """

    latency_s: float
    s_per_byte: float
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """Links by level, and how many tiles each level has.

    Example: Fabric(links=site.links, ranks_per_node=12, tiles_per_card=2, nodes_per_rack=64)
    """

    links: Mapping[Level, Link]
    ranks_per_node: int
    tiles_per_card: int
    nodes_per_rack: int
    ring_gb_per_s: float = 0.0
    """That a ring beyond a card reaches; 0: that of the link."""
    fitted: Mapping[str, Fitted] | None = None
    """Measured collectives, which replace the formulas on the number of ranks that they were measured on."""

    def level(self, ranks: int) -> Level:
        """The farthest that a message goes among so many ranks, placed one beside the other."""
        if ranks <= self.tiles_per_card:
            return "card"
        if ranks <= self.ranks_per_node:
            return "node"
        return "rack" if ranks <= self.ranks_per_node * self.nodes_per_rack else "machine"

    def cost(
        self, collective: Collective, num_bytes: float, ranks: int, algorithm: Algorithm | None = None, *, stride: int = 1
    ) -> Cost:  # fmt: skip
        """Of one call; nothing for a rank alone. `stride`: the ranks are each so far from the next, as replicas of shards are.

        What was measured on as many neighbours wins over a formula.
        """
        if ranks <= 1 or num_bytes <= 0:
            return NOTHING
        measured = (self.fitted or {}).get(collective)
        if measured and algorithm is None and (measured.ranks, stride) == (ranks, 1):
            return Cost(start=measured.latency_s, transfer=measured.s_per_byte * num_bytes)
        chosen = algorithm or CHOSEN[collective]
        if chosen == "hierarchical":
            return self._hierarchical(collective, num_bytes, ranks)
        level = self.level(ranks * stride)
        link, formula = self.links[level], FORMULAS[collective, chosen]
        striped = chosen == "ring" and level != "card" and self.ring_gb_per_s  # over several links of a tile at once
        rate = self.ring_gb_per_s if striped else link.gb_per_s
        return formula(num_bytes, ranks, link.latency_us * 1e-6, 1e-9 / rate)

    def _hierarchical(self, collective: Collective, num_bytes: float, ranks: int) -> Cost:
        """Inside the nodes, and between them, where each tile talks to its like: 1 / ranks_per_node of the bytes go out."""
        inner, outer = min(ranks, self.ranks_per_node), max(1, ranks // self.ranks_per_node)
        between = self.cost(collective, num_bytes / inner, outer, CHOSEN[collective], stride=self.ranks_per_node)
        if collective == "all_reduce":
            return self.cost("all_gather", num_bytes, inner, "ring").times(2) + between
        return self.cost(collective, num_bytes, inner, CHOSEN[collective]) + between


Formula = Callable[[float, int, float, float], Cost]


def ring(num_bytes: float, ranks: int, alpha: float, beta: float) -> Cost:
    """Gathering, or reducing and scattering, in n - 1 steps of V / n."""
    return Cost(start=(ranks - 1) * alpha, transfer=(ranks - 1) / ranks * num_bytes * beta)


def ring_all_reduce(num_bytes: float, ranks: int, alpha: float, beta: float) -> Cost:
    """A reduce-scatter and an all-gather."""
    return ring(num_bytes, ranks, alpha, beta).times(2)


def halving(num_bytes: float, ranks: int, alpha: float, beta: float) -> Cost:
    """Recursive halving (reduce_scatter) or doubling (all_gather): the bytes of a ring in log2 n steps."""
    return Cost(start=math.ceil(math.log2(ranks)) * alpha, transfer=(ranks - 1) / ranks * num_bytes * beta)


def rabenseifner(num_bytes: float, ranks: int, alpha: float, beta: float) -> Cost:
    """All-reduce by recursive halving, then doubling."""
    return halving(num_bytes, ranks, alpha, beta).times(2)


def double_tree(num_bytes: float, ranks: int, alpha: float, beta: float) -> Cost:
    """Broadcast over two trees at once, in blocks of the best size: (sqrt(d alpha) + sqrt(V beta))^2 with d = 2 log2 n."""
    start = 2 * math.ceil(math.log2(ranks)) * alpha
    return Cost(start=start + 2 * math.sqrt(start * num_bytes * beta), transfer=num_bytes * beta)


def double_tree_all_reduce(num_bytes: float, ranks: int, alpha: float, beta: float) -> Cost:
    """Reduced to the root over two trees, and broadcast."""
    return double_tree(num_bytes, ranks, alpha, beta).times(2)


FORMULAS: Mapping[tuple[Collective, Algorithm], Formula] = {
    ("all_reduce", "ring"): ring_all_reduce,
    ("all_reduce", "rabenseifner"): rabenseifner,
    ("all_reduce", "double_tree"): double_tree_all_reduce,
    ("all_gather", "ring"): ring,
    ("all_gather", "rabenseifner"): halving,
    ("reduce_scatter", "ring"): ring,
    ("reduce_scatter", "rabenseifner"): halving,
    ("broadcast", "double_tree"): double_tree,
}
