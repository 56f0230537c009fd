"""Every backend against the oracle in float64, through the public operation: values, entropies and gradients.

Backends whose kernels are interpreted or compiled run in a process of their own, so that a crash there is one failed test.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from mas_hpc_kernels import LogitRule, linear_logprob, reference
from mas_hpc_kernels.operation import PLAIN
from torch import Tensor

HERE = Path(__file__).parent
ISOLATED = {"triton": {"TRITON_INTERPRET": "1"}, "sycl": {}}
"""Backends that get a process of their own, and what they need in its environment."""
SUPPORTED = (sys.platform, os.uname().machine) == ("linux", "x86_64")
NAMED = os.environ.get("KERNELS_TESTED", "")
"""In such a process: the one backend to be tested."""
DEVICE = os.environ.get("KERNELS_DEVICE", "cpu")
"""Where that is."""
BACKENDS = (NAMED,) if NAMED else ("reference", "torch")


@pytest.mark.slow
@pytest.mark.skipif(bool(NAMED), reason="this is such a process")
@pytest.mark.skipif(not SUPPORTED, reason="Triton and Intel's CPU device for SYCL have wheels for Linux on x86-64")
@pytest.mark.parametrize("backend", ISOLATED)
def test_the_suite_holds_in_a_process_of_its_own(backend: str) -> None:
    environment = {**os.environ, "KERNELS_TESTED": backend, "PYTHONPATH": os.pathsep.join(sys.path), **ISOLATED[backend]}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=HERE.parents[1]
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs in float64; `temperature` as in the operation."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    rule: LogitRule = PLAIN
    temperature: float = 1.0


def random_case(num_targets: int, vocabulary: int, hidden: int = 8) -> Case:
    """Logits of about one unit."""
    generator = torch.Generator().manual_seed(vocabulary + num_targets)
    return Case(
        hidden_ND=torch.randn(num_targets, hidden, dtype=torch.float64, generator=generator),
        weight_VD=torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator) / hidden**0.5,
        target_N=torch.randint(vocabulary, (num_targets,), generator=generator),
    )


def huge_logits() -> Case:
    """Whole numbers up to 10,000, which float32 multiplies without error."""
    weight_VD = torch.stack([torch.arange(-50, 51), torch.arange(50, -51, -1) % 7], 1).double()
    return Case(
        hidden_ND=torch.tensor([[200.0, 1.0], [-200.0, 0.0], [1.0, 100.0]], dtype=torch.float64),
        weight_VD=weight_VD, target_N=torch.tensor([100, 3, 50]),
    )  # fmt: skip


def one_hot() -> Case:
    """The first target has all the probability, the second none."""
    case = random_case(2, 100)
    weight_VD = case.weight_VD.index_copy(0, torch.tensor([5]), 100 * case.hidden_ND[:1])
    return replace(case, weight_VD=weight_VD, hidden_ND=case.hidden_ND[:1].repeat(2, 1), target_N=torch.tensor([5, 6]))


def masked() -> Case:
    """A third of the vocabulary cannot be predicted, among it all of the first 40 tokens; it is never a target."""
    case = random_case(5, 100)
    bias_V = torch.linspace(-1, 1, 100, dtype=torch.float64)
    bias_V[:40], bias_V[50::7] = -torch.inf, -torch.inf
    return replace(case, rule=LogitRule(bias_V=bias_V), target_N=torch.tensor([41, 42, 43, 97, 98]))


CASES = {
    "random": random_case(33, 1000, 24),
    "tempered": replace(random_case(20, 300), temperature=0.6),
    "capped": replace(random_case(20, 300), rule=LogitRule(softcap=0.7), temperature=1.7),
    "biased": replace(random_case(20, 300), rule=LogitRule(bias_V=torch.linspace(-3, 3, 300, dtype=torch.float64))),
    "huge logits": huge_logits(),
    "one-hot": one_hot(),
    "all equal": replace(random_case(4, 100), weight_VD=torch.ones(100, 8, dtype=torch.float64)),
    "masked": masked(),
    "one target": random_case(1, 37),
    "V = 7": random_case(3, 7),
    "V = 49152": random_case(2, 49152),
    "V = 151936": random_case(2, 151936),
}


def call(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return reference.linear_logprob if backend == "reference" else partial(linear_logprob, backend=backend)


def results(backend: str, case: Case, dtype: torch.dtype, *, trained: bool) -> tuple[Tensor, ...]:
    """Log-probability, entropy, and gradients of hidden states and, where it is trained, the head and its bias."""
    device = "cpu" if backend == "reference" else DEVICE

    def leaf(tensor: Tensor, *, trains: bool) -> Tensor:
        return tensor.to(device, dtype).requires_grad_(trains)

    hidden_ND, weight_VD = leaf(case.hidden_ND, trains=True), leaf(case.weight_VD, trains=trained)
    bias_V = None if case.rule.bias_V is None else leaf(case.rule.bias_V, trains=trained)
    logprob_N, entropy_N = call(backend)(
        hidden_ND, weight_VD, case.target_N.to(device), temperature=case.temperature, entropy_gradient=trained,
        rule=replace(case.rule, bias_V=bias_V),
    )  # fmt: skip
    upstream_N = torch.linspace(-1, 1.5, len(logprob_N)).to(logprob_N)
    outputs, upstream = ((logprob_N, entropy_N), (upstream_N, 0.1 * upstream_N)) if trained else (logprob_N, upstream_N)
    inputs = [tensor for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None and tensor.requires_grad]
    return tuple(values.detach().cpu() for values in (logprob_N, entropy_N, *torch.autograd.grad(outputs, inputs, upstream)))


def gradient_scales(name: str, exact: tuple[Tensor, ...]) -> list[float]:
    """Norms of the gradients; where they are zero, as between equal rows of the head, of the term that cancels."""
    if name != "all equal":
        return [gradient.norm().item() for gradient in exact[2:]]
    case = CASES[name]
    upstream_N1 = torch.linspace(-1, 1.5, len(case.target_N), dtype=torch.float64)[:, None]
    return [(upstream_N1 * case.weight_VD[case.target_N]).norm().item(), *(gradient.norm().item() for gradient in exact[3:])]


def assert_close(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], scales: list[float], *, entropy: float) -> None:
    """Values within 1e-5 or, beyond 10, within float32; gradients within 1e-5 of `scales`."""
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=0, atol=entropy)
    for gradient, expected, scale in zip(ours[2:], exact[2:], scales, strict=True):
        assert (gradient.double() - expected).norm() <= 1e-5 * scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", CASES)
def test_float32_is_the_oracle_within_rounding(backend: str, name: str, trained: bool) -> None:
    exact = results("reference", CASES[name], torch.float64, trained=trained)
    ours = results(backend, CASES[name], torch.float32, trained=trained)
    assert all(value.isfinite().all() for value in exact)
    assert_close(ours, exact, gradient_scales(name, exact), entropy=5e-5)


# The oracle gets the rounded inputs: what is left is the rounding of products (8 bits in bfloat16) and of the results.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["random", "tempered", "capped", "biased", "masked", "V = 7", "V = 49152"])
def test_bfloat16_is_the_oracle_within_its_rounding(backend: str, name: str, trained: bool) -> None:
    case = CASES[name]
    bias_V = None if case.rule.bias_V is None else case.rule.bias_V.bfloat16().double()
    case = replace(
        case, rule=replace(case.rule, bias_V=bias_V), hidden_ND=case.hidden_ND.bfloat16().double(),
        weight_VD=case.weight_VD.bfloat16().double(),
    )  # fmt: skip
    exact = results("reference", case, torch.float64, trained=trained)
    ours = results(backend, case, torch.bfloat16, trained=trained)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert {gradient.dtype for gradient in ours[2:]} == {torch.bfloat16}
    for value, expected in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=5e-2)
    for gradient, expected in zip(ours[2:], exact[2:], strict=True):
        assert (gradient.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(backend: str, softcap: float) -> None:
    case = random_case(2, 4, 2)

    def values(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        rule = LogitRule(bias_V=bias_V, softcap=softcap)
        return call(backend)(hidden_ND, weight_VD, target_N, temperature=0.8, entropy_gradient=True, rule=rule)

    target_N = case.target_N.to(DEVICE)
    leaves = case.hidden_ND, case.weight_VD, torch.linspace(-1, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(values, [leaf.to(DEVICE).requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_no_targets_give_nothing_and_gradients_of_zero(backend: str, trained: bool) -> None:
    logprob_N, entropy_N, *gradients = results(backend, random_case(0, 10), torch.float32, trained=trained)
    assert logprob_N.shape == entropy_N.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_nan_is_not_hidden(backend: str, trained: bool) -> None:
    case = random_case(2, 100)
    case.weight_VD[50, 0] = torch.nan
    assert all(values.isnan().any() for values in results(backend, case, torch.float32, trained=trained))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_inputs_may_lie_in_memory_as_they_like(backend: str) -> None:
    case = random_case(6, 20)
    exact = results("reference", case, torch.float64, trained=True)
    across = replace(case, hidden_ND=case.hidden_ND.T.contiguous().T, weight_VD=case.weight_VD.T.contiguous().T)
    for ours, expected in zip(results(backend, across, torch.float64, trained=True), exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
