"""kernels.backend: what a run says about it, and how a mistake is reported."""

import io

import pytest
from rich.console import Console

from mas_hpc.errors import ConfigError
from mas_hpc.training.kernels import report_kernels


def test_the_choice_and_its_reason_are_said():
    console = Console(file=io.StringIO(), width=200)
    report_kernels("auto", "cpu", console)
    assert console.file.getvalue() == "kernels of the loss: torch (preferred on cpu)\n"


def test_a_named_backend_that_cannot_run_is_a_mistake_of_the_configuration():
    expected = r"^kernels\.backend=sycl: sycl kernels cannot run on cuda: .* not on cuda; or leave it at auto$"
    with pytest.raises(ConfigError, match=expected):
        report_kernels("sycl", "cuda", Console(quiet=True))
