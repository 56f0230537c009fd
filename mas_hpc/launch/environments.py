"""The environment of each role: what differs, and what contradicts itself. Environments are data; none is read here."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from mas_hpc.launch.finding import Finding
from mas_hpc.launch.plan import Group, JobPlan
from mas_hpc.launch.site import Profile

HIERARCHY = "ZE_FLAT_DEVICE_HIERARCHY"
MASKS = ("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR", "CUDA_VISIBLE_DEVICES")
ONE_A_WORLD = ("CCL_ATL_TRANSPORT", "CCL_KVS_MODE", "CCL_PROCESS_LAUNCHER", "FI_MR_CACHE_MONITOR", "FI_PROVIDER",
               "CCL_ALLREDUCE_SCALEOUT", "CCL_BCAST")  # fmt: skip
"""Ranks of one process group that differ here do not find each other, or wait for each other for ever."""
MPI_TRANSPORT = {"CCL_PROCESS_LAUNCHER": "pmix", "CCL_KVS_MODE": "mpi"}
"""What CCL_ATL_TRANSPORT=mpi goes with; the minimal set of UG data-science/frameworks/oneCCL.md."""


def environment_of(plan: JobPlan, group: Group) -> dict[str, str]:
    """All that the launcher sets for the ranks of a group."""
    common = {name: value for name, value in plan.site.common.set.items() if name not in group.environment.unset}
    return {**common, **group.environment.set}


def environment_table(plan: JobPlan) -> Table:
    """A row a variable that the site sets by role, one column a role; the job's roles are marked, and come as they run."""
    own = {group.role: group.environment for group in plan.groups}
    roles = [*own, *(role for role in plan.site.profiles if role not in own)]
    profiles = {role: own.get(role, plan.site.profiles.get(role, Profile())) for role in roles}
    table = Table(title="environment by role, beside what all have", title_justify="left")
    table.add_column("variable", no_wrap=True)
    for role in roles:
        table.add_column(f"{role} (this job)" if role in own else role, overflow="fold")
    names = sorted({name for profile in profiles.values() for name in (*profile.set, *profile.unset)})
    for name in names:
        table.add_row(name, *(_cell(profile, plan.site.common.set, name) for profile in profiles.values()))
    return table


def _cell(profile: Profile, common: Mapping[str, str], name: str) -> str:
    if name in profile.set:
        return profile.set[name]
    return "unset" if name in profile.unset else common.get(name, "")


def check_environments(plan: JobPlan) -> list[Finding]:
    """One hierarchy and way of binding, one transport in a world, offline ranks, local traffic beside the proxy."""
    return [_check_hierarchy(plan), _check_transport(plan), _check_proxy(plan)]


def _check_hierarchy(plan: JobPlan) -> Finding:
    """A rank binds itself, by set_device, to one of the node's tiles: nobody else may show it fewer."""
    if plan.site.tile.device == "cpu":
        return Finding(name="hierarchy", verdict="skipped", evidence="ranks compute on the CPU")
    for group in plan.groups:
        found = environment_of(plan, group)
        hierarchy = found.get(HIERARCHY, "")
        words = [word for word in plan.site.launcher.options if word.startswith("--gpu-bind") or "gpu_tile_compact" in word]
        masks = [f"{name}={found[name]}" for name in MASKS if name in found]
        if masks or words:
            evidence = f"{hierarchy or 'ranks'} with {', '.join((*masks, *words))}, beside set_device(local rank)"
            remedy = f"leave {', '.join((*(mask.partition('=')[0] for mask in masks), *words))} out of site.yaml"
            return Finding(name="hierarchy", verdict="error", evidence=evidence, remedy=remedy)
        per_card = plan.site.node.tiles_per_card
        if plan.site.tile.device == "xpu" and per_card > 1 and hierarchy != "FLAT":
            evidence = f"{HIERARCHY}={hierarchy or 'unset'} shows {plan.site.node.tiles // per_card} devices"
            remedy = f"{HIERARCHY}=FLAT: {plan.site.node.tiles} devices, one a tile"
            return Finding(name="hierarchy", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="hierarchy", verdict="ok", evidence=f"{plan.site.node.tiles} devices, bound by set_device alone")


def _check_transport(plan: JobPlan) -> Finding:
    environments = {group.role: environment_of(plan, group) for group in plan.groups}
    for name in ONE_A_WORLD:
        values = {role: found.get(name, "unset") for role, found in environments.items()}
        if len(set(values.values())) > 1:
            evidence = f"{name} differs in one world: {', '.join(f'{role} {value}' for role, value in values.items())}"
            remedy = "the same in both profiles of site.yaml, or a job for each role"
            return Finding(name="transport", verdict="error", evidence=evidence, remedy=remedy)
    for role, found in environments.items():
        if found.get("CCL_ATL_TRANSPORT") != "mpi":
            continue
        wrong = {name: value for name, value in MPI_TRANSPORT.items() if found.get(name) != value}
        if wrong or found.get("FI_MR_CACHE_MONITOR") == "disabled":
            wrong |= {"FI_MR_CACHE_MONITOR": "userfaultfd"} if found.get("FI_MR_CACHE_MONITOR") == "disabled" else {}
            evidence = f"{role}: CCL_ATL_TRANSPORT=mpi with " + ", ".join(f"{n}={found.get(n, 'unset')}" for n in wrong)
            remedy = ", ".join(f"{name}={value}" for name, value in wrong.items())
            return Finding(name="transport", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="transport", verdict="ok", evidence="one for all ranks")


def _check_proxy(plan: JobPlan) -> Finding:
    if not plan.site.proxy:
        return Finding(name="proxy", verdict="skipped", evidence=f"{plan.site.name} has none")
    wanted = {"localhost", "127.0.0.1", *((plan.site.host_suffix,) if plan.site.host_suffix else ())}
    if missing := sorted(wanted - set(plan.site.no_proxy)):
        evidence = f"{plan.site.proxy} is asked for {', '.join(missing)}"
        return Finding(name="proxy", verdict="error", evidence=evidence, remedy="add them to no_proxy in site.yaml")
    return Finding(name="proxy", verdict="ok", evidence=f"not for {', '.join(plan.site.no_proxy)}")
