"""Where every rank of a job is, as it says itself, and what is wrong with that."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mas_hpc.distributed.world import World
from mas_hpc.doctor.trials import shorten
from mas_hpc.launch.finding import Finding
from mas_hpc.launch.site import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """A rank.

    Example: RankPlace(rank=13, host="x1", local_rank=1, device="xpu:1", uuid="8680...", cpus=(9, 10), num_cpus=208, threads=4,
    torch="2.10.0", python="3.12.12")
    """

    rank: int
    host: str
    local_rank: int
    device: str
    uuid: str
    """Of the device; empty where it has none, as a CPU."""
    cpus: tuple[int, ...]
    """Logical cores that it may run on."""
    num_cpus: int
    """Of the host."""
    threads: int
    """That it computes with."""
    torch: str
    python: str


def place_of(world: World) -> RankPlace:
    """This rank's."""
    uuid = ""
    if world.device.type != "cpu":
        uuid = str(torch.get_device_module(world.device).get_device_properties(world.device).uuid)
    cpus = os.sched_getaffinity(0) if sys.platform != "darwin" else range(os.cpu_count() or 1)
    return RankPlace(
        rank=world.rank, host=world.hosts[world.rank], local_rank=world.local_rank, device=str(world.device), uuid=uuid,
        cpus=tuple(sorted(cpus)), num_cpus=os.cpu_count() or 1, threads=torch.get_num_threads(), torch=torch.__version__,
        python=sys.version.partition(" ")[0],
    )  # fmt: skip


def check_places(places: Sequence[RankPlace], node: Node | None) -> list[Finding]:
    """One finding a rule; `node` is what the site says of cores, None where it says nothing of this machine."""
    return [_devices(places), _local_ranks(places), _cores(places), _reserved(places, node), _threads(places), _alike(places)]


def _devices(places: Sequence[RankPlace]) -> Finding:
    found = {(place.host, place.uuid): place.device for place in places if place.uuid}
    twice = _shared((place.host, place.uuid, place.rank) for place in places if place.uuid)
    if twice:
        said = [f"{host}: ranks {_list(ranks)} on device {uuid}" for (host, uuid), ranks in twice.items()]
        remedy = "one way of giving devices: FLAT and set_device, or a mask for each rank; as many ranks as devices"
        return Finding(name="devices of ranks", verdict="error", evidence=shorten(said), remedy=remedy)
    kinds = ", ".join(sorted({place.device.partition(":")[0] for place in places}))
    evidence = f"{len(found)} for {len(places)} ranks" if found else f"{len(places)} ranks on {kinds}"
    return Finding(name="devices of ranks", verdict="ok", evidence=evidence)


def _local_ranks(places: Sequence[RankPlace]) -> Finding:
    twice = _shared((place.host, str(place.local_rank), place.rank) for place in places)
    if twice:
        said = [f"{host}: ranks {_list(ranks)} are all local rank {number}" for (host, number), ranks in twice.items()]
        remedy = "let one launcher alone number the ranks: unset what is left of another in the environment"
        return Finding(name="local ranks", verdict="error", evidence=shorten(said), remedy=remedy)
    evidence = f"{len(places)} ranks on {len({place.host for place in places})} host(s)"
    return Finding(name="local ranks", verdict="ok", evidence=evidence)


def _cores(places: Sequence[RankPlace]) -> Finding:
    """Ranks of one mask share it knowingly; those of masks that differ were bound, and should not meet."""
    said = []
    for host, own in _by_host(places).items():
        if len({place.cpus for place in own}) == 1:
            continue
        twice = _shared((host, str(core), place.rank) for place in own for core in place.cpus)
        said += [f"{host}: core {core} is of ranks {_list(ranks)}" for (_, core), ranks in twice.items()]
    if said:
        remedy = "a bind list whose ranks have cores of their own: mas-hpc launch --dry-run checks one"
        return Finding(name="cores of ranks", verdict="error", evidence=shorten(said), remedy=remedy)
    bound = sum(len(place.cpus) < place.num_cpus for place in places)
    return Finding(name="cores of ranks", verdict="ok", evidence=f"{bound} of {len(places)} ranks are bound; none meet")


def _reserved(places: Sequence[RankPlace], node: Node | None) -> Finding:
    if node is None or not node.reserved_cores:
        return Finding(name="reserved cores", verdict="skipped", evidence="the site names none")
    bad = [place for place in places if set(place.cpus) & set(node.reserved_cores)]
    if bad:
        evidence = f"ranks {_list(place.rank for place in bad)} may run on {_list(node.reserved_cores)}"
        remedy = "leave them out of --cpu-bind"
        return Finding(name="reserved cores", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="reserved cores", verdict="ok", evidence=f"no rank may run on {_list(node.reserved_cores)}")


def _threads(places: Sequence[RankPlace]) -> Finding:
    said = []
    for host, own in _by_host(places).items():
        threads, cores = sum(place.threads for place in own), len({core for place in own for core in place.cpus})
        if threads > cores:
            said.append(f"{host}: {threads} threads of {len(own)} ranks on {cores} cores")
    if said:
        remedy = "fewer ranks, more cores, or a smaller OMP_NUM_THREADS"
        return Finding(name="threads of ranks", verdict="warning", evidence=shorten(said), remedy=remedy)
    return Finding(name="threads of ranks", verdict="ok", evidence="a core for each")


def _alike(places: Sequence[RankPlace]) -> Finding:
    """An environment that is staged, or an image, that differs from node to node."""
    found: dict[str, set[str]] = defaultdict(set)
    for place in places:
        found[f"torch {place.torch}, python {place.python}"].add(place.host)
    if len(found) > 1:
        said = [f"{versions} on {shorten(sorted(hosts))}" for versions, hosts in found.items()]
        remedy = "stage the same environment to all nodes"
        return Finding(name="same software", verdict="error", evidence="; ".join(said), remedy=remedy)
    return Finding(name="same software", verdict="ok", evidence=f"{next(iter(found))} on all")


def _shared(owned: Iterable[tuple[str, str, int]]) -> Mapping[tuple[str, str], list[int]]:
    """Of host, thing and rank: the ranks of things that several have."""
    owners: dict[tuple[str, str], list[int]] = defaultdict(list)
    for host, thing, rank in owned:
        owners[host, thing].append(rank)
    return {key: ranks for key, ranks in owners.items() if len(ranks) > 1}


def _by_host(places: Sequence[RankPlace]) -> Mapping[str, list[RankPlace]]:
    found: dict[str, list[RankPlace]] = defaultdict(list)
    for place in places:
        found[place.host].append(place)
    return found


def _list(values: Iterable[Hashable]) -> str:
    return shorten([str(value) for value in values]).replace(";", ",")
