"""The C library host.cpp through ctypes, and the trial of its compiler in a process of its own (python host.py ...).

Standard library only: the trial runs this file as a script.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "kernels.hpp", FOLDER / "entry_points.cpp", FOLDER / "host.cpp")
REAL = {"float32": "f", "bfloat16": "f", "float16": "f", "float64": "d"}
"""Kind of the arithmetic for each type of the logits."""
SLOT = {"p": "Q", "l": "q", "f": "f4x", "d": "d"}
"""struct format of an argument of each kind: pointer, int64, float, double, in eight bytes."""


class Host:
    """The CPU device with the kernels compiled for one sub-group size; raises RuntimeError with the compiler's words."""

    def __init__(self, library: Path, driver: Path, cache: Path, num_threads: int, sub_group_size: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.mas_hpc_sycl_error.restype = ctypes.c_char_p
        self._library.mas_hpc_sycl_device.restype = ctypes.c_char_p
        for function in (self._library.mas_hpc_sycl_open, self._library.mas_hpc_sycl_launch):
            function.restype = ctypes.c_bool
        self._library.mas_hpc_sycl_compile.restype = ctypes.c_void_p
        self._require(self._library.mas_hpc_sycl_open(*map(_text, (driver, cache, num_threads))))
        header, entry_points = (source.read_bytes() for source in SOURCES[:2])
        option = f"-DMAS_HPC_SUB_GROUP_SIZE={sub_group_size}"
        self._program = self._library.mas_hpc_sycl_compile(entry_points, _text(SOURCES[0].name), header, _text(option))
        self._require(self._program is not None)

    @property
    def device(self) -> str:
        return self._library.mas_hpc_sycl_device().decode()

    def launch(self, name: str, num_groups: int, group_size: int, arguments: Sequence[tuple[str, int | float]]) -> None:
        """Run a kernel to its end; `arguments` are (kind, value) in the order of its parameters, pointers as addresses."""
        kinds, values = zip(*arguments, strict=True)
        packed = struct.pack("=" + "".join(SLOT[kind] for kind in kinds), *values)
        sizes = ctypes.c_int64(num_groups), ctypes.c_int64(group_size)
        program = ctypes.c_void_p(self._program)
        self._require(self._library.mas_hpc_sycl_launch(program, _text(name), *sizes, _text("".join(kinds)), packed))

    def _require(self, success: bool) -> None:
        if not success:
            raise RuntimeError(self._library.mas_hpc_sycl_error().decode(errors="replace"))


def _text(value: object) -> bytes:
    return str(value).encode()


def trial(host: Host, group_size: int) -> None:
    """Run each kernel in each type on a row of four equal logits: the softmax has maximum 0 and sum 4."""
    for dtype, real in REAL.items():
        number = {"f": ctypes.c_float, "d": ctypes.c_double}[real]
        product, target, one = (ctypes.c_double * 4)(), (ctypes.c_int64 * 1)(1), (number * 1)(1)
        maximum, total, weighted, logit = ((number * 1)(5) for _ in range(4))
        head = (_pointer(product), _pointer(target), ("p", 0), (real, 0.0), (real, 1.0))
        statistics = (_pointer(maximum), _pointer(total), _pointer(weighted))
        host.launch(f"row_statistics_{dtype}", 1, group_size, (*head, *statistics, _pointer(logit), ("l", 4)))
        gradients = (_pointer(one), ("p", 0), _pointer(product))
        host.launch(f"product_gradient_{dtype}", 1, group_size, (*head, *statistics, *gradients, ("l", 4)))
        result = [array[0] for array in (maximum, total, weighted, logit)]
        if result != [0, 4, 0, 0]:
            raise RuntimeError(f"{dtype}: maximum, sum, weighted sum and target of four equal logits are {result}")


def _pointer(array: ctypes.Array) -> tuple[str, int]:
    return "p", ctypes.addressof(array)


if __name__ == "__main__":
    library, driver, cache = map(Path, sys.argv[1:4])
    num_threads, sub_group_size, work_group_size = map(int, sys.argv[4:])
    trial(Host(library, driver, cache, num_threads, sub_group_size), work_group_size)
