"""The Triton backend without a GPU: interpreted, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mas_hpc_kernels import KernelError, choose, triton

HERE = Path(__file__).parent
SUPPORTED = (sys.platform, os.uname().machine) == ("linux", "x86_64")
on_linux_x86_64 = pytest.mark.skipif(not SUPPORTED, reason="Triton has wheels for Linux on x86-64")
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""What a block may have at most; CUDA programming guide, technical specifications; AMD CDNA 3 ISA, local data share."""
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}


def run(*arguments: str, interpret: bool) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=HERE.parents[1]
    )  # fmt: skip


@pytest.mark.slow
@on_linux_x86_64
def test_interpreted_kernels_equal_the_oracle():
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "triton_checks.py"), interpret=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
@on_linux_x86_64
def test_kernels_compile_for_each_gpu_within_its_shared_memory_and_with_its_matrix_instructions():
    done = run(str(HERE / "compile_kernels.py"), interpret=False)
    assert done.returncode == 0, done.stderr[-6000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 18
    for kernel in kernels:
        target, shared_bytes = kernel["target"], kernel["shared_bytes"]
        assert kernel["tile_bytes"] <= shared_bytes <= SHARED_BYTES[target], kernel
        if kernel["element"] == "bf16":
            assert MATRIX_INSTRUCTION[target] in kernel["instructions"], kernel
        if target.startswith("sm"):  # one tile is computed with while the next is loaded
            assert shared_bytes >= 2 * kernel["tile_bytes"], kernel


@on_linux_x86_64
def test_a_cpu_needs_the_interpreter_and_other_devices_their_compiler():
    assert "TRITON_INTERPRET=1" in triton.missing("cpu")
    assert triton.missing("cuda") is None
    assert "none for intel" in triton.missing("xpu")
    assert "no compiler for mps" in triton.missing("mps")
    with pytest.raises(KernelError, match=r"triton kernels cannot run on cpu: .*TRITON_INTERPRET=1"):
        choose("triton", "cpu")


def test_without_triton_the_reason_names_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert "pip install triton" in triton.missing("cuda")


def test_every_type_of_element_has_tiles_whose_products_fit_the_tensor_cores():
    """tl.dot takes powers of two from 16."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64")
    from mas_hpc_kernels.triton.launch import TILES

    assert {kind for kind, _ in TILES} == {"cuda", "hip", "xpu", "cpu"}
    for tile in TILES.values():
        assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.rows, tile.vocabulary, tile.hidden))
