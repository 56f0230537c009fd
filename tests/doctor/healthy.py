"""Facts of nodes on which nothing is wrong, for tests that plant one fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mas_hpc.distributed.device import Offer
from mas_hpc.doctor.facts import Devices, Facts, Host, Reach, Room, Software
from mas_hpc.launch.site import load_site

GIB = 1 << 30
LAPTOP = Facts(
    site=load_site("laptop"),
    environment={"OMP_NUM_THREADS": "2"},
    software=Software(
        versions={"torch": "2.13.0+cpu", "transformers": "5.23.0", "mpich": "5.0.2"},
        requirements=("torch>=2.8", "transformers>=5.0", 'vllm>=0.32; extra == "vllm"', 'winloop; sys_platform == "win32"'),
        mpi_library="MPICH Version: 5.0.2", mpiexec="/venv/bin/mpiexec", mpiexec_version="HYDRA build details:",
    ),
    devices=Devices(torch="2.13.0+cpu", offer=Offer(devices={}, backends=("gloo",))),
    host=Host(
        name="laptop", cpus=(0, 1, 2, 3), num_cpus=4, free_memory_bytes=8 * GIB, numa_nodes=1, max_open_files=4096,
        max_core_bytes=0, rooms=(Room(what="runs_dir", path="/home/me/runs", free_bytes=100 * GIB),), modes={"/home/me": 0o755},
    ),
    reaches=(Reach(what="loopback", address="127.0.0.1:40001"), Reach(what="own name", address="laptop:40002")),
    exchange="", exchange_s=4.0,
)  # fmt: skip
AURORA = Facts(
    site=load_site("aurora"),
    environment={
        "LOADEDMODULES": "gcc/13.3.0:frameworks/2025.3.1", "ZE_FLAT_DEVICE_HIERARCHY": "FLAT", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "4", "https_proxy": "http://proxy.alcf.anl.gov:3128",
        "no_proxy": "localhost,127.0.0.1,.hsn.cm.aurora.alcf.anl.gov",
    },
    software=Software(
        versions={"torch": "2.10.0a0+git449b176", "transformers": "5.1.0", "triton-xpu": "3.6.0", "intel-sycl-rt": "2025.3.1"},
        requirements=("torch>=2.8", "transformers>=5.0"),
        mpi_library="MPICH Version: 4.3.0rc3", mpiexec="/opt/cray/pals/1.8/bin/mpiexec", mpiexec_version="mpiexec (PALS) 1.8.0",
        icpx_version="Intel(R) oneAPI DPC++/C++ Compiler 2025.3.1 (2025.3.1.20251023)",
    ),
    devices=Devices(
        torch="2.10.0a0+git449b176", offer=Offer(devices={"xpu": 12}, backends=("gloo", "xccl")), memory_gib=(63.98,) * 12
    ),
    host=Host(
        name="x4117c4s6b0n0", cpus=(4, 5, 6, 7), num_cpus=208, free_memory_bytes=900 * GIB, numa_nodes=4, max_open_files=65536,
        max_core_bytes=0, rooms=(Room(what="scratch", path="/tmp", free_bytes=400 * GIB),),
        modes={"/home/me": 0o700, "/home/me/.ssh": 0o700},
    ),
    num_local_ranks=12,
    reaches=(Reach(what="own name", address="x4117c4s6b0n0.hsn.cm.aurora.alcf.anl.gov:40002"),),
)  # fmt: skip


def with_part(facts: Facts, part: str, **changes: Any) -> Facts:
    """The same, but for some fields of one part, such as host."""
    return replace(facts, **{part: replace(getattr(facts, part), **changes)})


def with_environment(facts: Facts, **changes: str | None) -> Facts:
    """The same, with other variables; None: without it."""
    merged = {**facts.environment, **changes}
    return replace(facts, environment={name: value for name, value in merged.items() if value is not None})
