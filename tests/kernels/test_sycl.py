"""The SYCL backend on the CPU device; whatever compiles or runs a kernel does so in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mas_hpc_kernels import sycl
from mas_hpc_kernels.errors import KernelError
from mas_hpc_kernels.sycl import cpu, host, xpu
from torch.utils import cpp_extension

HERE = Path(__file__).parent
IS_SUPPORTED = (sys.platform, os.uname().machine) == ("linux", "x86_64")
on_linux_x86_64 = pytest.mark.skipif(not IS_SUPPORTED, reason="Intel's CPU device for SYCL is built for Linux on x86-64 only")
USE = "from mas_hpc_kernels.sycl import DEFAULTS, cpu; print(cpu.CpuKernels(DEFAULTS['cpu']).device)"
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command, variables = [sys.executable, *arguments], PATHS | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=variables, cwd=HERE.parents[1])


@on_linux_x86_64
@pytest.mark.slow
def test_kernels_equal_the_oracle_on_the_cpu_device():
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "sycl_checks.py"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@on_linux_x86_64
@pytest.mark.slow
def test_a_process_ends_cleanly_and_the_next_one_compiles_nothing(tmp_path):
    """From an empty cache, which the second process finds as the first has left it."""
    first = run("-c", USE, HOME=str(tmp_path))
    assert first.returncode == 0 and first.stderr == "" and first.stdout.strip()
    known = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {"host.so", "tried-32-64"} < {path.name for path in known}
    assert run("-c", USE, HOME=str(tmp_path)).stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == known


@on_linux_x86_64
def test_a_mistake_in_a_kernel_is_an_error_with_the_compilers_words(tmp_path):
    """In the folder of a copy, whose header lacks a semicolon."""
    for source in (*host.SOURCES, Path(host.__file__)):
        text = source.read_text(encoding="utf-8").replace("slope = inverse_temperature;", "slope = inverse_temperature")
        (tmp_path / source.name).write_text(text, encoding="utf-8")
    installed = cpu._installed()
    options = (cpu._library(installed), installed.driver, tmp_path, 1, 16, 64)
    done = run(str(tmp_path / "host.py"), *map(str, options))
    assert done.returncode == 1
    assert "expected ';'" in done.stderr and "kernels.hpp" in done.stderr


def test_a_compiler_that_crashes_is_one_error():
    with pytest.raises(KernelError, match=r"trial died of SIGSEGV: .*\n.*last words"):
        crash = "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
        cpu._run((sys.executable, "-c", crash), "the SYCL compiler's trial")


def test_a_compiler_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "TIMEOUT_S", 0.1)
    with pytest.raises(KernelError, match=r"g\+\+ did not end within 0.1 s"):
        cpu._run((sys.executable, "-c", "import time; time.sleep(60)"), "g++")


@on_linux_x86_64
def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert "apt-get install g++" in sycl.missing("cpu")


def test_other_devices_are_refused_with_the_reason():
    assert "not on cuda" in sycl.missing("cuda")


@pytest.mark.skipif(torch.xpu.is_available(), reason="this machine has an XPU")
def test_without_an_xpu_the_reason_names_torch():
    assert "sees none" in sycl.missing("xpu")


CALL_EXTENSION = """
import sys, torch
from pathlib import Path
from mas_hpc_kernels.operation import Statistics, Upstream
from mas_hpc_kernels.sycl import xpu
from mas_hpc_kernels.sycl.rows import Geometry, Rows
xpu.library = lambda: Path(sys.argv[1])
kernels = xpu.XpuKernels(Geometry(32, 512))
numbers = torch.zeros(2)
rows = Rows(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None, 0.0, 1.0)
statistics = Statistics(numbers, numbers, numbers, numbers)
calls = (kernels.row_statistics, (rows, statistics)), (kernels.product_gradient, (rows, statistics, Upstream(numbers, None)))
for call, arguments in calls:
    try:
        call(*arguments)
    except NotImplementedError as error:
        print(str(error).partition("with arguments from")[0])
"""


@on_linux_x86_64
@pytest.mark.slow
def test_the_extension_compiles_registers_and_takes_the_arguments_that_python_passes(tmp_path):
    """Its host part, by g++ as in SyclExtension; operators that accept their arguments refuse the CPU as a device."""
    include, libraries = cpp_extension.include_paths()[0], Path(torch.__file__).parent / "lib"
    installed = cpu._installed()
    folders = (include, installed.include, xpu.FOLDER)
    defines = ("C10_USING_CUSTOM_GENERATED_MACROS", "SYCL_DISABLE_FSYCL_SYCLHPP_WARNING")
    flags = ("-std=c++20", "-O0", "-w", "-shared", "-fPIC", *(f"-D{name}" for name in defines), *(f"-I{it}" for it in folders))
    sources = ("-x", "c++", xpu.SOURCES[1], HERE / "sycl_extension_stub.cpp", "-x", "none")
    linked = (f"-L{libraries}", "-ltorch_cpu", "-lc10", installed.library, f"-Wl,-rpath,{installed.library.parent}")
    cpu._run(("g++", *flags, *sources, *linked, "-o", tmp_path / "extension.so"), "g++")
    done = run("-c", CALL_EXTENSION, str(tmp_path / "extension.so"))
    refused = [f"Could not run 'mas_hpc_sycl::{name}'" for name in ("row_statistics", "product_gradient")]
    assert [line.strip() for line in done.stdout.splitlines()] == refused, done.stderr
