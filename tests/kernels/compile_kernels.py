"""Compile the Triton kernels as they are launched on a GPU, which need not be there; print one JSON line a kernel.

test_triton.py runs this in a process of its own, because a compiler may crash.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import triton
import triton.language as tl
from mas_hpc_kernels.triton import kernels
from mas_hpc_kernels.triton.launch import TILES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": ("cuda", GPUTarget("cuda", 80, 32)),
    "sm_90": ("cuda", GPUTarget("cuda", 90, 32)),
    "gfx942": ("hip", GPUTarget("hip", "gfx942", 64)),
}
INPUTS = ("hidden_ND", "weight_VD", "bias_V", "product_grad_NV")
INTEGERS = ("num_rows", "vocabulary", "size", "hidden_stride", "weight_stride", "part")
FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ENTROPY")


def source(kernel: triton.runtime.JITFunction, element: str, constants: dict[str, object], *, has_all: bool) -> ASTSource:
    """A kernel with bias, soft cap and entropy gradient, or with none of them."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in INPUTS:
            signature[name] = f"*{element}"
        elif name == "target_N":
            signature[name] = "*i64"
        elif name.isupper():
            signature[name] = "constexpr"
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32" if name in ("inverse_temperature", "softcap") else "*fp32"
    absent = () if has_all else ("bias_V", "entropy_grad_N")
    known = {name: constants[name] for name in kernel.arg_names if name in constants}
    known |= {name: has_all for name in FLAGS if name in kernel.arg_names}
    known |= {name: None for name in absent if name in signature}
    signature |= dict.fromkeys(known, "constexpr")
    # What a launch finds out by itself: addresses and sizes are multiples of 16. Else nothing is loaded ahead.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in INTEGERS
    }
    return ASTSource(kernel, signature, known, aligned)


def compiled(target: str, element: str, kernel: triton.runtime.JITFunction, *, has_all: bool) -> dict[str, object]:
    kind, gpu = TARGETS[target]
    size_bytes = {"fp32": 4, "bf16": 2}[element]
    chosen = asdict(TILES[kind, size_bytes])
    constants = {"BLOCK_N": chosen["rows"], "BLOCK_V": chosen["vocabulary"], "BLOCK_D": chosen["hidden"]}
    made = triton.compile(
        source(kernel, element, constants | {"DTYPE": tl.float32, "UPCAST": False}, has_all=has_all),
        target=gpu,
        options={name: chosen[name] for name in ("num_warps", "num_stages")},
    )
    text = made.asm.get("ptx") or made.asm["amdgcn"]
    instructions = [name for name in ("wgmma", "mma.sync", "v_mfma") if name in text]
    binary = made.asm.get("cubin") or made.asm["hsaco"]
    return {
        "target": target, "element": element, "kernel": kernel.fn.__name__, "has_all": has_all,
        "shared_bytes": made.metadata.shared, "binary_bytes": len(binary), "instructions": instructions,
        "tile_bytes": (chosen["rows"] + chosen["vocabulary"]) * chosen["hidden"] * size_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    for target in TARGETS:
        for kernel in (kernels.statistics_kernel, kernels.gradient_kernel):
            for element, has_all in (("fp32", True), ("bf16", True), ("bf16", False)):
                print(json.dumps(compiled(target, element, kernel, has_all=has_all)), flush=True)
