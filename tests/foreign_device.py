"""A device for tests: its tensors lie in the host's memory, but operations that mix them with the host's fail, as on a GPU.

Importing this registers the device type `slab` with torch, for the whole process. What is kept from a real device: a tensor has
one device, operands have to share it (but for numbers, and copies), factories make tensors where they are told to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "slab"
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize")


class Slab(torch.Tensor):
    """A tensor of the device; `host` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Slab:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=DEVICE
        )
        made.host = host
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            made = Slab(self.host.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, requires_grad=self.requires_grad) if is_parameter else made
        return memo[id(self)]

    # Of these, torch's own do not come by __torch_dispatch__.

    def tolist(self) -> Any:
        return self.host.tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(torch.tensor(index, device=DEVICE) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(
        cls, call: Any, types: Sequence[type], args: tuple[Any, ...] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        return run_on_host(call, args, options or {})


def run_on_host(call: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Do an operation of the device on what its tensors hold."""
    leaves, form = tree_flatten((args, dict(options)))
    here = [leaf for leaf in leaves if isinstance(leaf, Slab)]
    elsewhere = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Slab) and leaf.dim()]
    name = call.overloadpacket._qualified_op_name
    if here and elsewhere and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME} and cpu")
    hosts = [
        leaf.host if isinstance(leaf, Slab) else torch.device("cpu") if isinstance(leaf, torch.device) else leaf
        for leaf in leaves
    ]
    host_args, host_options = tree_unflatten(hosts, form)
    found = call(*host_args, **host_options | ({"pin_memory": False} if "pin_memory" in options else {}))
    if name == "aten::copy_":
        return args[0]
    target = options.get("device")
    stays = bool(here) if target is None else torch.device(target).type == NAME
    known = {id(leaf.host): leaf for leaf in here}

    def returned(made: torch.Tensor) -> torch.Tensor:
        return known[id(made)] if id(made) in known else Slab(made) if stays else made

    return tree_map_only(torch.Tensor, returned, found)


class _Module(_DummyBackendModule):
    """torch.slab."""

    def get_device_name(self, device: torch.device) -> str:
        return NAME

    def max_memory_allocated(self, device: torch.device) -> int:
        return 0

    def synchronize(self) -> None:
        return None


def _then_moved(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor cannot make tensors of a device that is written in Python."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **options)
        return make(*args, **options).to(device)

    return made


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
_library = torch.library.Library("_", "IMPL", "PrivateUse1")
_library.fallback(lambda call, *args, **options: run_on_host(call, args, options), "PrivateUse1")
torch.tensor, torch.as_tensor = _then_moved(torch.tensor), _then_moved(torch.as_tensor)
