"""Products by oneDNN are those of torch's own linear layer, in value and in gradient, and are made only where they pay."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mas_hpc.models import linear as module
from mas_hpc.models.adapters import BankLinear, Route
from mas_hpc.models.linear import MIN_ROWS, Linear, linear, use_linear

IN, OUT = 320, 256
onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="torch has no oneDNN or no MKL",
)


@pytest.fixture(autouse=True)
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes the same everywhere; only its speed depends on the maker."""
    monkeypatch.setattr(module, "_is_amd", lambda: True)


def layer(*, bias: bool = True, trained: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).requires_grad_(trained)


def ours_of(plain: nn.Linear) -> nn.Linear:
    model = nn.Sequential(deepcopy(plain))
    use_linear(model)
    return model[0]


def weighted(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, OUT)).sum() + output.square().mean()


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """By whatever requires one: the input, then the parameters."""
    wanted = [part for part in (x, *module.parameters()) if part.requires_grad]
    return list(torch.autograd.grad(weighted(module(x)), wanted))


def passes_onednn(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_LinearBackward"


@onednn
@pytest.mark.parametrize("input_needs_it", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_layer(bias: bool, trained: bool, input_needs_it: bool) -> None:
    plain = layer(bias=bias, trained=trained)
    ours = ours_of(plain)
    x = torch.randn(2, MIN_ROWS, IN, requires_grad=input_needs_it)
    assert passes_onednn(ours(x)) == (trained or input_needs_it)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=5e-6)
    if trained or input_needs_it:
        torch.testing.assert_close(gradients(ours, x), gradients(plain, x), rtol=1e-5, atol=2e-4)


@onednn
@pytest.mark.parametrize("reduce", [Tensor.sum, lambda output: output[:, ::2].sum(), lambda output: output.T.cumsum(0).sum()])
def test_gradients_that_arrive_expanded_or_strided_are_read_right(reduce) -> None:
    plain, x = layer(), torch.randn(MIN_ROWS, IN, requires_grad=True)
    weight = plain.weight
    found, expected = (torch.autograd.grad(reduce(f(x, weight)), (x, weight)) for f in (linear, F.linear))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)


@onednn
def test_a_changed_weight_counts_at_once() -> None:
    ours, x = ours_of(layer()), torch.randn(MIN_ROWS, IN)
    ours(x)
    with torch.no_grad():
        ours.weight.mul_(3)
        torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=0, atol=1e-5)


@onednn
def test_a_frozen_layer_keeps_no_input_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    x = torch.randn(MIN_ROWS, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours_of(layer(trained=False))(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(OUT, IN)]


@onednn
def test_a_recomputed_layer_gives_the_same_gradients() -> None:
    ours, x = ours_of(layer()), torch.randn(MIN_ROWS, IN, requires_grad=True)
    wanted = (x, *ours.parameters())
    again = torch.autograd.grad(weighted(checkpoint(ours, x, use_reentrant=False)), wanted)
    assert all(torch.equal(*pair) for pair in zip(again, gradients(ours, x), strict=True))


@onednn
def test_the_frozen_layer_below_an_adapter_is_multiplied_the_same_way() -> None:
    plain, x = layer(trained=False), torch.randn(MIN_ROWS, IN, requires_grad=True)
    adapted = BankLinear(plain, [torch.Generator().manual_seed(0)], 4, Route())
    assert passes_onednn(adapted(x))


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(MIN_ROWS - 1, IN, torch.float32), (MIN_ROWS, 8, torch.float32), (MIN_ROWS, IN, torch.float64), (0, IN, torch.float32)],
    ids=["few rows", "small weight", "double precision", "no rows"],
)
def test_everything_else_is_left_to_torch(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(OUT, width, dtype=dtype)
    output = linear(x, weight)
    assert not passes_onednn(output)
    assert torch.equal(output, F.linear(x, weight))


@pytest.mark.parametrize(("name", "chosen"), [("AMD EPYC 9V74", True), ("Intel Xeon", False), (None, False)])
def test_the_maker_of_the_processor_decides(name: str | None, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if name is None else {"cpu_name": name})
    assert module._is_amd.__wrapped__() is chosen


@onednn
def test_an_intel_processor_keeps_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_amd", lambda: False)
    x, weight = torch.randn(MIN_ROWS, IN, requires_grad=True), torch.randn(OUT, IN)
    assert not passes_onednn(linear(x, weight))


def test_only_plain_layers_change_and_their_names_stay() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(2, 3), "special": Special(2, 3)})
    names = list(model.state_dict())
    use_linear(model)
    assert (type(model["plain"]), type(model["special"])) == (Linear, Special)
    assert list(model.state_dict()) == names
