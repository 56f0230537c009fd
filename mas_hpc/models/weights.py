"""Weights by name, on their way out of one model and into another that serves the same policies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mas_hpc.checksum import Checksum
from mas_hpc.errors import CheckpointError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.types import BASE_POLICY


def named_weights(model: nn.Module, bank: AdapterBank | None, policies: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    """(policy, name, tensor) of the policies that changed, in an order that depends on names alone.

    Of BASE_POLICY every parameter of the model, itself and not a copy (with FSDP2, its DTensor), frozen ones included and
    tied ones once; of another policy a copy of its adapter under PEFT's names. Buffers are left out: nobody trains them.
    """
    for policy in policies:
        if policy == BASE_POLICY:
            yield from ((policy, name, tensor) for name, tensor in model.named_parameters() if ".lora_" not in name)
        else:
            assert bank is not None, f"policy {policy!r} has no adapter: the model has no bank"
            yield from ((policy, name, tensor) for name, tensor in bank.tensors(policy).items())


@torch.no_grad()
def assign_weights(model: nn.Module, bank: AdapterBank | None, weights: Iterable[tuple[str, str, Tensor]]) -> str:
    """Copy weights into the model and its adapters; return the checksum of what they hold then, "" of no weights.

    A parameter of BASE_POLICY may come alone; an adapter comes whole. A tensor is read before the next one is asked for,
    so it may be a view into a buffer that is used again.
    Raises CheckpointError for a name, shape or dtype that the model does not have; what came before it has been copied.
    """
    parameters = {name: tensor for name, tensor in model.named_parameters(remove_duplicate=False) if ".lora_" not in name}
    adapters: dict[str, dict[str, Tensor]] = {}
    total = Checksum()
    for policy, name, tensor in weights:
        if policy == BASE_POLICY:
            _check(name, tensor, parameters.get(name))
            parameters[name].copy_(tensor)
            total.add(policy, name, parameters[name])
        else:
            adapters.setdefault(policy, {})[name] = tensor.clone()
    for policy, tensors in adapters.items():
        served = _assign_adapter(bank, policy, tensors)
        for name, tensor in served.items():
            total.add(policy, name, tensor)
    return str(total)


def _assign_adapter(bank: AdapterBank | None, policy: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    policies = () if bank is None else bank.policies
    if bank is None or policy not in policies:
        raise CheckpointError(
            f"weights of policy {policy!r}: the model has adapters of {list(policies)}; give both sides the same "
            "adapters.policies and team"
        )
    expected = bank.parameters_of(policy)[0]
    for name, tensor in tensors.items():
        _check_dtype(name, tensor, expected)
    bank.assign(policy, tensors)
    return bank.tensors(policy)


def _check(name: str, tensor: Tensor, expected: Tensor | None) -> None:
    if expected is None or tensor.shape != expected.shape:
        known = "no such parameter" if expected is None else tuple(expected.shape)
        raise CheckpointError(
            f"weights of the base model: {name} has shape {tuple(tensor.shape)}, expected {known}; they are of another "
            "model: give both sides the same model.path"
        )
    _check_dtype(name, tensor, expected)


def _check_dtype(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.dtype != expected.dtype:
        raise CheckpointError(
            f"weights: {name} is {tensor.dtype}, but the model has {expected.dtype}; give both sides the same model.dtype"
        )
