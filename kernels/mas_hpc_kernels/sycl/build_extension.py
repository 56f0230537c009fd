"""Build extension.sycl for this torch: TORCH_XPU_ARCH_LIST=pvc python -m mas_hpc_kernels.sycl.build_extension.

Needs a torch with XPU support, the icpx of the oneAPI release that torch was built with, and ninja; no GPU.
"""

from __future__ import annotations

import tempfile

import setuptools
from torch.utils.cpp_extension import BuildExtension, SyclExtension

from mas_hpc_kernels.sycl.xpu import FOLDER, NAME, SOURCES, library


def main() -> None:
    """Leave the extension where xpu.py looks for it."""
    flags = {"cxx": ["-O2"], "sycl": ["-O2"]}
    extension = SyclExtension(NAME, [str(SOURCES[1])], include_dirs=[str(FOLDER)], extra_compile_args=flags)
    with tempfile.TemporaryDirectory() as scratch:
        setuptools.setup(
            name=NAME,
            ext_modules=[extension],
            cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)},
            script_args=["build_ext", "--build-lib", str(library().parent), "--build-temp", scratch],
        )
    print(library())


if __name__ == "__main__":
    main()
