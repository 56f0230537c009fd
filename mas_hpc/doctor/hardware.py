"""Checks of the node: devices, cores, memory, disks, limits."""

from __future__ import annotations

from mas_hpc.doctor.facts import Facts, Room
from mas_hpc.doctor.software import XCCL_SINCE, is_at_least
from mas_hpc.launch.finding import Finding, Verdict
from mas_hpc.launch.site import Binding, parse_cores

GIB = 1 << 30
LEAST_GIB = {"runs_dir": (1.0, 10.0), "temporary folder": (0.1, 1.0), "scratch": (1.0, 10.0), "shared memory": (0.03, 0.25)}
"""Free: below the first an error, below the second a warning. A checkpoint of a model of 1 B parameters takes 16 GB; MPICH
and weights on their way to engines take shared memory, 30 MB at least."""
LEAST_MEMORY_GIB = (0.5, 2.0)
"""A rank of torch, without a model, takes half of the first."""
LEAST_FILES = 1024
"""Open at once: a rank has one for each peer."""
LONGEST_TEMPORARY = 60
"""Characters: names of sockets have 107 at most, and multiprocessing and vLLM add more than 40."""
MEMORY_SLACK = 0.9
"""Of what a site's tile has."""


def check_devices(facts: Facts) -> Finding:
    """As many tiles as the site's nodes have, of their memory."""
    seen, site = facts.devices, facts.site
    found = ", ".join(f"{count} {kind}" for kind, count in seen.offer.devices.items()) or "none"
    if seen.memory_gib:
        found += f" of {min(seen.memory_gib):.1f} GiB"
    if not facts.is_cluster or site.tile.device == "cpu":
        return Finding(name="devices", verdict="ok", evidence=f"torch {seen.torch} sees accelerators: {found}")
    kind, count = site.tile.device, seen.offer.devices.get(site.tile.device, 0)
    evidence = f"torch {seen.torch} sees {found}; a node of {site.name} has {site.node.tiles} {kind}"
    if not count:
        remedy = "on a login node look on a compute node; there: load the site's modules, and unset device masks"
        return Finding(name="devices", verdict="error", evidence=evidence, remedy=remedy)
    masks = ", ".join(name for name in ("ZE_AFFINITY_MASK", "CUDA_VISIBLE_DEVICES") if name in facts.environment)
    if count != site.node.tiles and not masks:
        remedy = "ZE_FLAT_DEVICE_HIERARCHY=FLAT shows tiles as devices; a tile that is still missing is broken: another node"
        return Finding(name="devices", verdict="error", evidence=evidence, remedy=remedy)
    if min(seen.memory_gib) < MEMORY_SLACK * site.tile.memory_gib:
        remedy = f"a tile has {site.tile.memory_gib} GiB: another node, or mend site.yaml"
        return Finding(name="devices", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="devices", verdict="ok", evidence=evidence + (f", shown by {masks}" if masks else ""))


def check_backends(facts: Facts) -> Finding:
    """One that carries the tensors of each device that there is, and gloo for everything else."""
    offer, wanted = facts.devices.offer, {"xpu": "xccl", "cuda": "nccl"}
    missing = [wanted[kind] for kind in offer.devices if wanted[kind] not in offer.backends]
    if "gloo" not in offer.backends:
        missing.append("gloo")
    evidence = f"torch has {', '.join(offer.backends) or 'none'}"
    if missing:
        old = "" if is_at_least(facts.devices.torch, XCCL_SINCE) else "; torch 2.8 is the first with xccl"
        remedy = f"install a torch that has {', '.join(missing)}{old}"
        return Finding(name="backends", verdict="error", evidence=f"{evidence}, not {', '.join(missing)}", remedy=remedy)
    return Finding(name="backends", verdict="ok", evidence=evidence)


def check_hierarchy(facts: Facts) -> Finding:
    """One way of giving devices to ranks: set_device by local rank."""
    if facts.site.tile.device != "xpu" or not facts.is_cluster:
        return Finding(name="hierarchy", verdict="skipped", evidence="no tiles that a process could see two ways")
    found = facts.environment.get("ZE_FLAT_DEVICE_HIERARCHY", "unset")
    mask = facts.environment.get("ZE_AFFINITY_MASK", "")
    evidence = f"ZE_FLAT_DEVICE_HIERARCHY={found}" + (f", ZE_AFFINITY_MASK={mask}" if mask else "")
    if found != "FLAT" or mask:
        remedy = "ZE_FLAT_DEVICE_HIERARCHY=FLAT, no mask and no gpu_tile_compact.sh: ranks call set_device"
        return Finding(name="hierarchy", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="hierarchy", verdict="ok", evidence=evidence)


def check_cores(facts: Facts) -> Finding:
    """This process is beside the system's services only where nobody bound it."""
    host, node = facts.host, facts.site.node
    seen = f"{len(host.cpus)} of {host.num_cpus} logical cores"
    reserved = sorted(set(host.cpus) & set(node.reserved_cores))
    if not facts.is_cluster or not reserved:
        return Finding(name="cores", verdict="ok", evidence=seen)
    evidence = f"{seen}, {', '.join(map(str, reserved))} among them, which the system keeps for itself"
    is_bound = len(host.cpus) < host.num_cpus
    remedy = "leave them out of --cpu-bind" if is_bound else "start ranks with a bind list: mas-hpc launch --site"
    return Finding(name="cores", verdict="error" if is_bound else "warning", evidence=evidence, remedy=remedy)


def check_bind_lists(facts: Facts) -> Finding:
    """Those of the site: no reserved core, none that there is not, none that two ranks have."""
    if not facts.site.bindings:
        return Finding(name="bind lists", verdict="skipped", evidence=f"{facts.site.name} binds no ranks to cores")
    wrong = [f"{one.ranks_per_node} ranks: {text}" for one in facts.site.bindings if (text := _wrong(facts, one))]
    if wrong:
        remedy = f"mend bindings in the site.yaml of {facts.site.name}"
        return Finding(name="bind lists", verdict="error", evidence="; ".join(wrong), remedy=remedy)
    evidence = ", ".join(f"{one.ranks_per_node} ranks" for one in facts.site.bindings)
    return Finding(name="bind lists", verdict="ok", evidence=evidence)


def _wrong(facts: Facts, binding: Binding) -> str:
    """What is wrong with a bind list; empty when nothing is."""
    node = facts.site.node
    cores = [core for text in binding.cores for core in parse_cores(text)]
    physical = [core % node.num_cores for text in binding.cores for core in {c % node.num_cores for c in parse_cores(text)}]
    bad = {
        "reserved": set(cores) & set(node.reserved_cores),
        "beyond the last": {core for core in cores if core >= node.num_cores * node.threads_per_core},
        "of two ranks": {core for core in physical if physical.count(core) > 1},
        "also of a communication worker": set(physical) & set(binding.worker_cores),
    }
    return ", ".join(f"{_cores(found)} {why}" for why, found in bad.items() if found)


def _cores(found: set[int]) -> str:
    return f"core{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))}"


def check_threads(facts: Facts) -> Finding:
    """Two threads on one core are slower than one."""
    text, cores = facts.environment.get("OMP_NUM_THREADS", ""), len(facts.host.cpus)
    threads = int(text) if text.isdecimal() and int(text) else 1
    ranks = facts.num_local_ranks
    evidence = f"{ranks} rank{'s' if ranks > 1 else ''} x OMP_NUM_THREADS={text or 'unset (1 a rank)'} on {cores} cores"
    if text and threads > cores:
        remedy = f"OMP_NUM_THREADS={max(1, cores // ranks)}"
        return Finding(name="threads", verdict="warning", evidence=evidence, remedy=remedy)
    is_shared = cores == facts.host.num_cpus  # bound ranks have cores of their own
    if is_shared and ranks * threads > cores:
        remedy = f"OMP_NUM_THREADS={cores // ranks}, or fewer ranks" if cores >= ranks else "fewer ranks"
        return Finding(name="threads", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="threads", verdict="ok", evidence=evidence)


def check_memory(facts: Facts) -> Finding:
    """That ranks may still take."""
    if facts.host.free_memory_bytes is None:
        return Finding(name="memory", verdict="skipped", evidence="this system does not say what is free")
    free_gib = facts.host.free_memory_bytes / GIB
    least, enough = LEAST_MEMORY_GIB
    evidence = f"{free_gib:.1f} GiB free"
    if free_gib < enough:
        verdict: Verdict = "error" if free_gib < least else "warning"
        return Finding(name="memory", verdict=verdict, evidence=evidence, remedy="end other programs, or take another node")
    return Finding(name="memory", verdict="ok", evidence=evidence)


def check_numa(facts: Facts) -> Finding:
    """HBM of a CPU in another mode than flat, or a socket that is missing, shows here."""
    if not facts.is_cluster or facts.host.numa_nodes is None:
        return Finding(name="NUMA", verdict="skipped", evidence=f"{facts.host.numa_nodes} nodes; nothing to compare with")
    evidence = f"{facts.host.numa_nodes} nodes; those of {facts.site.name} have {facts.site.node.numa_nodes}"
    if facts.host.numa_nodes != facts.site.node.numa_nodes:
        remedy = "a login node, or a node in another memory mode: look on, or take, another"
        return Finding(name="NUMA", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="NUMA", verdict="ok", evidence=evidence)


def check_limits(facts: Facts) -> Finding:
    """Open files, and what a crash of many ranks would write."""
    files, core = facts.host.max_open_files, facts.host.max_core_bytes
    evidence = f"ulimit -n {'unlimited' if files == -1 else files}, -c {'unlimited' if core == -1 else core}"
    if files is not None and 0 <= files < LEAST_FILES:
        return Finding(name="limits", verdict="warning", evidence=evidence, remedy=f"ulimit -n {LEAST_FILES}, or more")
    if facts.is_cluster and core:
        remedy = "ulimit -c 0: a crash of all ranks would fill the file system"
        return Finding(name="limits", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="limits", verdict="ok", evidence=evidence)


def check_temporary(facts: Facts) -> Finding:
    """Sockets are files there, and their names are short."""
    folder = facts.host.temporary
    if len(folder.encode()) > LONGEST_TEMPORARY:
        evidence = f"TMPDIR={folder} has {len(folder.encode())} characters"
        remedy = f"TMPDIR={facts.site.node.scratch}: at most {LONGEST_TEMPORARY}, for names of sockets"
        return Finding(name="TMPDIR", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="TMPDIR", verdict="ok", evidence=folder)


def check_rooms(facts: Facts) -> Finding:
    """Each folder that a run writes to: the worst of them decides."""
    found = [_room(room) for room in facts.host.rooms]
    told = ", ".join(f"{room.what} {room.path}: {room.free_bytes / GIB:.1f} GiB" for room in facts.host.rooms)
    verdicts: tuple[Verdict, ...] = ("error", "warning")
    for verdict in verdicts:
        if bad := [(evidence, remedy) for judged, evidence, remedy in found if judged == verdict]:
            evidence, remedies = "; ".join(one for one, _ in bad), "; ".join(dict.fromkeys(remedy for _, remedy in bad))
            return Finding(name="disk", verdict=verdict, evidence=evidence, remedy=remedies)
    return Finding(name="disk", verdict="ok", evidence=told)


def _room(room: Room) -> tuple[str, str, str]:
    """Verdict, evidence and remedy."""
    place = f"{room.what} {room.path}"
    if room.problem:
        return "error", f"{place}: {room.problem}", f"make room in {room.path}, or name a folder that you may write to"
    least, enough = LEAST_GIB[room.what]
    free_gib = room.free_bytes / GIB
    if free_gib >= enough:
        return "ok", "", ""
    return "error" if free_gib < least else "warning", f"{place}: {free_gib:.2f} GiB free", f"make room: {enough} GiB"


CHECKS = (
    check_devices, check_backends, check_hierarchy, check_cores, check_bind_lists, check_threads, check_memory, check_numa,
    check_limits, check_temporary, check_rooms,
)  # fmt: skip
