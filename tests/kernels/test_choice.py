"""Which backend runs where, and what is said about it."""

import pytest
from mas_hpc_kernels import KernelError, backends, choose

WORDS = {"triton": "no compiler", "sycl": "no extension"}


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The backends besides torch that can run, on whatever device."""
    found: set[str] = set()
    monkeypatch.setattr(backends, "missing", lambda name, _: None if name in found | {"torch"} else WORDS[name])
    return found


@pytest.mark.parametrize(
    ("device", "present", "expected"),
    [
        ("cpu", {"triton", "sycl"}, ("torch", "preferred on cpu")),
        ("mps", {"triton", "sycl"}, ("torch", "preferred on mps")),
        ("cuda", {"triton"}, ("triton", "preferred on cuda")),
        ("cuda", set(), ("torch", "triton cannot run: no compiler")),
        ("xpu", {"triton", "sycl"}, ("triton", "preferred on xpu")),
        ("xpu", {"sycl"}, ("sycl", "triton cannot run: no compiler")),
        ("xpu", set(), ("torch", "triton cannot run: no compiler; sycl cannot run: no extension")),
    ],
)
def test_auto_takes_the_first_that_can_run_and_says_why(available, device, present, expected):
    available |= present
    choice = choose("auto", device)
    assert (choice.name, choice.reason) == expected


def test_a_named_backend_is_taken_or_refused_but_never_replaced(available):
    available |= {"sycl"}
    assert choose("sycl", "xpu").name == "sycl"
    assert choose("torch", "xpu").name == "torch"
    with pytest.raises(KernelError, match="triton kernels cannot run on xpu: no compiler"):
        choose("triton", "xpu")
