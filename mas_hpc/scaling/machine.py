"""The machine as the model sees it: a site's hardware, corrected by what was fitted on published points or measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mas_hpc.launch.site import Link, Site
from mas_hpc.scaling.calibration import Calibration
from mas_hpc.scaling.network import Fabric, Fitted

FITTED_FILE = Path(__file__).parent / "fitted.json"
"""What mas_hpc.scaling.fit has found on published points, by site."""
UNFITTED_SHARE = 0.7
"""Of the GEMM rate that passes reach where nobody has measured it: elementwise work and attention are slower."""
UNFITTED_SPREAD = 0.3
"""Standard deviation of log(measured / predicted) where nothing was measured."""
RESTART_S = 60.0
"""Of starting ranks and loading weights; supposed."""
LEAST_SPREAD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Numbers that a prediction needs; rates are of one tile with all others of its node at work.

    Example: machine_of(load_site("aurora")).ranks(nodes=256) == 3072
    """

    fabric: Fabric
    memory_bytes: float
    gemm_flops: float
    """FLOP/s that forward and backward passes reach."""
    memory_bytes_per_s: float
    optimizer_bytes_per_s: float
    host_bytes_per_s: float
    host_memory_bytes: float
    """Of a node."""
    write_bytes_per_s: float
    """Of one checkpoint to storage, whatever the nodes."""
    restart_s: float
    """From a fault to the next step."""
    stage_base_s: float
    """Of copying the environment to nodes before a job, on few of them."""
    stage_node_s: float
    """That each further node adds to it."""
    hours_between_failures: float
    """Of one node."""
    num_nodes: int
    spread: float
    """Standard deviation of log(measured / predicted)."""
    source: str
    """Where the rates are from, to be printed."""

    def ranks(self, nodes: int) -> int:
        """On so many nodes."""
        return nodes * self.fabric.ranks_per_node

    def start_seconds(self, nodes: int) -> float:
        """From the start of a job to its first step."""
        return self.restart_s + self.stage_base_s + self.stage_node_s * nodes


def machine_of(site: Site, calibration: Calibration | None = None) -> Machine:
    """The site as published points correct it, if any do; what was measured there comes first."""
    values = read_fitted().get(site.name)
    machine = corrected(site, values) if values else written(site)
    return _calibrated(machine, calibration) if calibration else machine


def read_fitted() -> dict[str, dict[str, float]]:
    """Parameters that were fitted, by site."""
    return json.loads(FITTED_FILE.read_text(encoding="utf-8"))


def written(site: Site) -> Machine:
    """The site as its file says."""
    tile, node = site.tile, site.node
    fabric = Fabric(
        links=dict(site.links), ranks_per_node=node.tiles, tiles_per_card=node.tiles_per_card,
        nodes_per_rack=site.nodes_per_rack,
    )  # fmt: skip
    return Machine(
        fabric=fabric, memory_bytes=tile.memory_gib * 2**30, gemm_flops=tile.gemm_tflops * 1e12 * UNFITTED_SHARE,
        memory_bytes_per_s=tile.memory_gb_per_s * 1e9, optimizer_bytes_per_s=tile.memory_gb_per_s * 1e9,
        host_bytes_per_s=tile.host_gb_per_s * 1e9, host_memory_bytes=node.memory_gib * 2**30,
        write_bytes_per_s=site.storage_gb_per_s * 1e9, restart_s=RESTART_S, stage_base_s=0.0, stage_node_s=0.0,
        hours_between_failures=site.hours_between_failures, num_nodes=site.num_nodes, spread=UNFITTED_SPREAD,
        source=f"the numbers of site {site.name}, of which none was fitted",
    )  # fmt: skip


def corrected(site: Site, values: Mapping[str, float]) -> Machine:
    """The site with the parameters of a fit: gemm_share, hop_us, gb_per_s, gather_gb_per_s, spread, write_gb_per_s, stage_*."""
    machine = written(site)
    far = Link(latency_us=values["hop_us"], gb_per_s=values["gb_per_s"])
    return replace(
        machine, gemm_flops=site.tile.gemm_tflops * 1e12 * values["gemm_share"], spread=values["spread"],
        fabric=replace(
            machine.fabric, links={**machine.fabric.links, "rack": far, "machine": far}, ring_gb_per_s=values["gather_gb_per_s"]
        ),
        write_bytes_per_s=values["write_gb_per_s"] * 1e9, stage_base_s=values["stage_base_s"],
        stage_node_s=values["stage_node_s"],
        source=f"site {site.name}, fitted on published points (mas-hpc scale --validate)",
    )  # fmt: skip


def _calibrated(machine: Machine, found: Calibration) -> Machine:
    """What was measured, where it was measured: collectives of as many ranks, and the link that joins so many."""
    fitted = {
        line.collective: Fitted(latency_s=line.latency_s, s_per_byte=line.s_per_byte, ranks=found.ranks)
        for line in found.collectives
    }
    links = dict(machine.fabric.links)
    if (reduced := fitted.get("all_reduce")) and reduced.latency_s > 0 and reduced.s_per_byte > 0:
        share = (found.ranks - 1) / found.ranks  # as rabenseifner has it
        links[machine.fabric.level(found.ranks)] = Link(
            latency_us=1e6 * reduced.latency_s / (2 * math.ceil(math.log2(found.ranks))),
            gb_per_s=2e-9 * share / reduced.s_per_byte,
        )
    return replace(
        machine, gemm_flops=found.pass_tflops * 1e12, memory_bytes_per_s=found.memory_gb_per_s * 1e9,
        optimizer_bytes_per_s=found.optimizer_gb_per_s * 1e9, spread=max(LEAST_SPREAD, found.spread),
        fabric=replace(machine.fabric, links=links, fitted=fitted),
        source=f"measured on {found.ranks} ranks of {found.host}, {found.date}",
    )  # fmt: skip
