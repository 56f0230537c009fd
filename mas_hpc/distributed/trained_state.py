"""Parameters and optimizer states by name, for strategies whose optimizer is an ordinary one of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

Fill = Callable[[Mapping[str, Tensor]], None]
"""Overwrites tensors with what was saved under their names. Collective."""


def trained_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, Parameter]:
    """What the optimizer has, under the module's names."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in trained}


def state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """parameter/<name> of what is trained, and optimizer/<name>/<key>, such as exp_avg, of what has taken a step.

    The tensors themselves, not copies; DTensors where the parameters are.
    """
    parameters = trained_parameters(module, optimizer)
    found = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            assert isinstance(tensor, Tensor), f"{type(optimizer).__name__} keeps {key}={tensor!r}, which is no tensor"
            found[f"optimizer/{name}/{key}"] = tensor
    return found


@torch.no_grad()
def start_optimizer(module: nn.Module, optimizer: Optimizer, started: Collection[str]) -> None:
    """Give the parameters of these names, and no others, an optimizer state, whose values are then overwritten.

    The optimizer itself makes it, by a step of rate 0 on gradients of zero: shapes, types and placements are its own. No
    weight moves.
    """
    optimizer.state.clear()
    parameters = trained_parameters(module, optimizer)
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros_like(parameter) if name in started else None
    rates = [settings["lr"] for settings in optimizer.param_groups]
    for settings in optimizer.param_groups:
        settings["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for settings, rate in zip(optimizer.param_groups, rates, strict=True):
        settings["lr"] = rate


@torch.no_grad()
def assign(module: nn.Module, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Overwrite every trained parameter with the tensor of its name."""
    for name, parameter in trained_parameters(module, optimizer).items():
        parameter.copy_(parameters[name])


@torch.no_grad()
def give_memory(module: nn.Module, device: torch.device) -> None:
    """Give parameters on meta uninitialised memory on the device, in place: who refers to them still does."""
    for parameter in module.parameters():
        if parameter.is_meta:
            there = torch.empty_like(parameter, device=device)
            torch.utils.swap_tensors(parameter, Parameter(there, requires_grad=parameter.requires_grad))


def started_in(names: Collection[str]) -> set[str]:
    """The parameters that have an optimizer state among names of `state_of`."""
    states = [name.removeprefix("optimizer/") for name in names if name.startswith("optimizer/")]
    return {name.rpartition("/")[0] for name in states}
