"""Where each rank is on its node: cores, socket, tiles, network card; and whether that is good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from mas_hpc.launch.finding import Finding
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.site import Role, parse_cores

FILE = "bindings in site.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank and what it has of its node.

    Example: Place(rank=13, node=1, local_rank=1, role="trainer", text="9-12", cores=(9, 10, 11, 12), tiles=(1,), nic=1)
    """

    rank: int
    node: int
    """Place of its host in the host file."""
    local_rank: int
    role: Role
    text: str
    """Cores as the bind list has them; empty: not bound."""
    cores: tuple[int, ...]
    tiles: tuple[int, ...]
    """Its devices, counted in the node; the first is the one that the rank computes on."""
    nic: int | None
    """Of its first core; None where that is not known."""


def places(plan: JobPlan) -> Iterator[Place]:
    """Of the first node of each group, in order: the group's other nodes are alike."""
    rank = node = 0
    for group in plan.groups:
        for local_rank in range(group.ranks_per_node):
            text = group.cores[local_rank] if group.cores else ""
            cores = parse_cores(text) if text else ()
            yield Place(
                rank=rank + local_rank, node=node, local_rank=local_rank, role=group.role, text=text, cores=cores,
                tiles=tiles_of(plan, local_rank, group.ranks_per_node),
                nic=plan.site.node.nic_of_core(min(cores)) if cores and plan.site.node.nics_by_core else None,
            )  # fmt: skip
        rank, node = rank + group.ranks, node + group.nodes


def tiles_of(plan: JobPlan, local_rank: int, ranks_per_node: int) -> tuple[int, ...]:
    """The rank's share of the node's tiles, as distributed/device.py deals them out; none where ranks share tiles."""
    share = plan.site.node.tiles // ranks_per_node
    return tuple(range(local_rank * share, (local_rank + 1) * share))


def binding_table(plan: JobPlan) -> Table:
    """A row a rank of the first node of each group."""
    table = Table(title="binding, the first node of each group", title_justify="left")
    for column in ("rank", "host", "local", "socket", "cores", plan.site.tile.device, "NIC", "role"):
        table.add_column(column, no_wrap=True)
    node = plan.site.node
    for place in places(plan):
        sockets = sorted({node.socket_of_core(core) for core in place.cores})
        table.add_row(
            str(place.rank), f"#{place.node}", str(place.local_rank), _join(sockets), place.text or "any",
            _join(place.tiles), _join([] if place.nic is None else [place.nic]), place.role,
        )  # fmt: skip
    return table


def check_binding(plan: JobPlan) -> list[Finding]:
    """One finding for each rule of where ranks may be."""
    found = list(places(plan))
    if not any(place.cores for place in found):
        return [Finding(name="binding", verdict="skipped", evidence=f"{plan.site.name} binds no ranks to cores")]
    nodes = [[place for place in found if place.node == node] for node in dict.fromkeys(place.node for place in found)]
    rules = (_reserved, _overlaps, _sockets, _tiles, _pairs, _workers, _services, _nics)
    return [rule(plan, ranks) for ranks in nodes for rule in rules]


def _reserved(plan: JobPlan, ranks: list[Place]) -> Finding:
    node = plan.site.node
    last = node.num_cores * node.threads_per_core - 1
    bad = {core: place.local_rank for place in ranks for core in place.cores if core in node.reserved_cores or core > last}
    if bad:
        evidence = f"local ranks {sorted(set(bad.values()))} have cores {sorted(bad)}: reserved, or beyond {last}"
        remedy = f"leave {_join(node.reserved_cores)} out of {FILE}"
        return Finding(name="reserved cores", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="reserved cores", verdict="ok", evidence=f"no rank has {_join(node.reserved_cores) or 'one'}")


def _overlaps(plan: JobPlan, ranks: list[Place]) -> Finding:
    """Logical cores i and i + num_cores are one."""
    owners = Counter(core % plan.site.node.num_cores for place in ranks for core in {*_physical(plan, place)})
    if shared := sorted(core for core, count in owners.items() if count > 1):
        evidence = f"cores {_join(shared)} belong to more than one rank (a core has {plan.site.node.threads_per_core} threads)"
        return Finding(name="overlap", verdict="error", evidence=evidence, remedy=f"give each rank cores of its own in {FILE}")
    return Finding(name="overlap", verdict="ok", evidence=f"{len(owners)} cores, each of one rank")


def _sockets(plan: JobPlan, ranks: list[Place]) -> Finding:
    node = plan.site.node
    across = [place for place in ranks if len({node.socket_of_core(core) for core in place.cores}) > 1]
    if across:
        evidence = "; ".join(f"local rank {place.local_rank} has {place.text}" for place in across)
        remedy = f"keep each rank's cores on one socket: {node.cores_per_socket} and those after it are of socket 1"
        return Finding(name="sockets", verdict="error", evidence=f"across sockets: {evidence}", remedy=remedy)
    return Finding(name="sockets", verdict="ok", evidence="each rank's cores are of one socket")


def _tiles(plan: JobPlan, ranks: list[Place]) -> Finding:
    node, device = plan.site.node, plan.site.tile.device
    if device != "cpu" and len(ranks) > node.tiles:
        evidence = f"{len(ranks)} ranks a node, and {node.tiles} of {device}"
        return Finding(name="tiles", verdict="error", evidence=evidence, remedy=f"at most --ppn {node.tiles}")
    far = [
        place.local_rank for place in ranks
        if {node.socket_of_core(core) for core in place.cores} != {node.socket_of_tile(tile) for tile in place.tiles}
    ]  # fmt: skip
    if far and device != "cpu":
        evidence = f"local ranks {far} have cores of one socket and tiles of another"
        remedy = f"order the lists of cores as the tiles: {node.tiles // node.sockets} a socket"
        return Finding(name="tiles", verdict="error", evidence=evidence, remedy=remedy)
    if len(ranks) < node.tiles and device != "cpu":
        evidence = f"{node.tiles - len(ranks)} of {node.tiles} tiles of each node compute nothing: a rank computes on one"
        remedy = f"--ppn {node.tiles}, unless ranks want the memory or the network of the others"
        return Finding(name="tiles", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="tiles", verdict="ok", evidence="each rank's tiles are of its cores' socket")


def _pairs(plan: JobPlan, ranks: list[Place]) -> Finding:
    """Tiles that share layers talk at every one: ten times faster on a card than between cards."""
    size, per_card, links = plan.tensor_parallel, plan.site.node.tiles_per_card, plan.site.links
    if size == 1:
        return Finding(name="tensor parallel", verdict="skipped", evidence="1: no layer is shared")
    if len(ranks) % size:
        evidence = f"distributed.tensor_parallel={size} does not divide {len(ranks)} ranks a node: a layer crosses the network"
        return Finding(
            name="tensor parallel", verdict="error", evidence=evidence, remedy=f"distributed.tensor_parallel={per_card}"
        )
    tiles = [place.tiles[0] for place in ranks if place.tiles]
    groups = [tiles[start : start + size] for start in range(0, len(tiles), size)]
    if apart := [group for group in groups if len({tile // per_card for tile in group}) > 1]:
        evidence = f"tiles {_join(apart[0])} share each layer over {links['node'].gb_per_s:g} GB/s between cards"
        remedy = f"distributed.tensor_parallel={per_card} with --ppn {plan.site.node.tiles}: {links['card'].gb_per_s:g} GB/s"
        return Finding(name="tensor parallel", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="tensor parallel", verdict="ok", evidence=f"groups of {size} tiles, each on one card")


def _workers(plan: JobPlan, ranks: list[Place]) -> Finding:
    """Threads of the communication library want cores that no rank computes on, on their rank's socket."""
    node = plan.site.node
    workers = _worker_cores(plan)
    if not workers:
        free = (
            node.num_cores - len({core for place in ranks for core in _physical(plan, place)}) - len(_physical_reserved(plan))
        )
        if free < len(ranks) and plan.site.tile.device == "xpu":
            evidence, remedy = f"{free} cores of a node are left for oneCCL's {len(ranks)} workers", f"fewer cores in {FILE}"
            return Finding(name="CCL workers", verdict="warning", evidence=evidence, remedy=remedy)
        return Finding(name="CCL workers", verdict="ok", evidence=f"{free} cores of a node are free")
    taken = {core for place in ranks for core in place.cores} | set(node.reserved_cores)
    wrong = sorted(taken & set(workers))
    far = [
        place.local_rank for place, core in zip(ranks, workers, strict=False)
        if node.socket_of_core(core) not in {node.socket_of_core(own) for own in place.cores}
    ]  # fmt: skip
    if wrong or far or len(set(workers)) != len(ranks):
        evidence = f"worker cores {_join(workers)}: ranks or the system have {wrong}, local ranks {far} are on the other socket"
        remedy = f"give each rank a core of its socket, that nobody has, as worker_cores in {FILE}"
        return Finding(name="CCL workers", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="CCL workers", verdict="ok", evidence=f"cores {_join(workers)}, free and on their ranks' sockets")


def _services(plan: JobPlan, ranks: list[Place]) -> Finding:
    services = set(plan.site.node.service_cores)
    taken = {core % plan.site.node.num_cores for place in ranks for core in place.cores} | set(_worker_cores(plan))
    if both := sorted(services & taken):
        evidence = f"cores {_join(both)} are those of services such as Copper"
        return Finding(name="service cores", verdict="warning", evidence=evidence, remedy=f"leave them out of {FILE}")
    return Finding(name="service cores", verdict="ok", evidence=f"{_join(sorted(services)) or 'none'}: no rank has one")


def _nics(plan: JobPlan, ranks: list[Place]) -> Finding:
    nics = plan.site.node.nics
    used = Counter(place.nic for place in ranks if place.nic is not None)
    if not used:
        return Finding(name="NICs", verdict="skipped", evidence=f"{plan.site.name} chooses them not by core")
    fair = -(-len(ranks) // nics)
    if max(used.values()) > fair:
        evidence = (
            f"first cores lead {max(used.values())} of {len(ranks)} ranks to one NIC, of {nics}: {_join(sorted(used))} used"
        )
        remedy = f"begin lists of cores at different c mod {nics // plan.site.node.sockets}, in {FILE}"
        return Finding(name="NICs", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="NICs", verdict="ok", evidence=f"{len(used)} of {nics}, at most {max(used.values())} ranks each")


def _worker_cores(plan: JobPlan) -> tuple[int, ...]:
    """As the environment of the ranks has them."""
    text = plan.groups[0].environment.set.get("CCL_WORKER_AFFINITY", "")
    return tuple(int(core) for core in text.split(",")) if text else ()


def _physical(plan: JobPlan, place: Place) -> set[int]:
    return {core % plan.site.node.num_cores for core in place.cores}


def _physical_reserved(plan: JobPlan) -> set[int]:
    return {core % plan.site.node.num_cores for core in plan.site.node.reserved_cores}


def _join(numbers: object) -> str:
    assert isinstance(numbers, list | tuple)
    return ",".join(map(str, numbers))
