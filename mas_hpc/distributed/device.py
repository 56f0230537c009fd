"""What a rank computes on, and which backend carries its tensors: chosen by what this process's torch offers.

Precedence of auto: xpu, cuda, cpu. Of the backends of xpu: xccl (in torch since 2.8), then ccl (oneCCL's bindings, out of
support, for older torch alone).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mas_hpc.errors import ConfigError, LaunchError

Wanted = Literal["auto", "cpu", "cuda", "xpu"]
BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl",), "xpu": ("xccl", "ccl")}
"""Of each kind of device, the preferred one first."""
LEGACY_BINDINGS = "oneccl_bindings_for_pytorch"
"""Registers the backend ccl when it is imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What this process could compute and communicate with.

    Example: Offer(devices={"xpu": 12}, backends=("gloo", "xccl"))
    """

    devices: Mapping[str, int]
    """Accelerators that are visible, by kind."""
    backends: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Why something that is installed cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one rank uses.

    Example: Choice(kind="xpu", index=3, backend="xccl", reason="xpu: 12 visible, number 3 by local rank; xccl")
    """

    kind: Literal["cpu", "cuda", "xpu"]
    index: int = 0
    backend: str
    """Of gradients and weights; empty where there is none, which a single rank does not need."""
    reason: str

    @property
    def device(self) -> torch.device:
        """As torch names it."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def group_backend(self) -> str:
        """As init_process_group takes it: tensors of the host, such as offloaded shards, always go over gloo."""
        return "gloo" if self.kind == "cpu" else f"cpu:gloo,{self.kind}:{self.backend}"


def find_offer(load_module: Callable[[str], object] = importlib.import_module) -> Offer:
    """Ask torch. The bindings of ccl are imported only where xpu has nothing else, as they cost memory."""
    counts = {
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }
    backends = tuple(name for name in ("gloo", "nccl", "xccl") if dist.is_backend_available(name))
    notes: tuple[str, ...] = ()
    if counts["xpu"] and "xccl" not in backends:
        failure = _load_legacy_bindings(load_module)
        backends, notes = (backends, (failure,)) if failure else ((*backends, "ccl"), ())
    return Offer(devices={kind: count for kind, count in counts.items() if count}, backends=backends, notes=notes)


def _load_legacy_bindings(load_module: Callable[[str], object]) -> str:
    """Why the backend ccl cannot be had; empty when it can."""
    try:
        load_module(LEGACY_BINDINGS)
    except Exception as error:  # noqa: BLE001 (beside another torch they fail with whatever comes, such as AttributeError)
        return f"{LEGACY_BINDINGS}: {type(error).__name__}: {error}"
    return ""


def choose(wanted: Wanted, offer: Offer, *, local_rank: int, local_size: int, size: int) -> Choice:
    """The device and backend of the rank that is `local_rank` of `local_size` on its host, in a world of `size`.

    A rank that sees one device has been given it by the launcher (ZE_AFFINITY_MASK, CUDA_VISIBLE_DEVICES); otherwise each takes
    the first of its share, so that fewer ranks than devices are spread over cards and sockets, as their cores are. Raises
    ConfigError when a named device is missing, LaunchError when there are fewer devices than ranks on this host, or no backend
    for them.
    """
    kind = next((kind for kind in ("xpu", "cuda") if kind in offer.devices), "cpu") if wanted == "auto" else wanted
    if kind == "cpu":
        return Choice(kind="cpu", backend="gloo", reason=_why_cpu(wanted, offer))
    count = offer.devices.get(kind, 0)
    if not count:
        raise ConfigError(
            f"distributed.device={kind}: torch {torch.__version__} sees no such device here, but "
            f"{dict(offer.devices) or 'the CPU'}; load its module or driver, install a torch for it, or set auto or cpu"
        )
    if 1 < count < local_size:
        raise LaunchError(
            f"{local_size} ranks on this host, but {count} {kind} devices: start at most {count} ranks a host, or show tiles "
            "as devices (ZE_FLAT_DEVICE_HIERARCHY=FLAT)"
        )
    backend = next((name for name in BACKENDS[kind] if name in offer.backends), "")
    if size > 1 and not backend:
        raise LaunchError(
            f"{size} ranks on {kind}, but torch {torch.__version__} has none of the backends {' and '.join(BACKENDS[kind])} "
            f"({'; '.join(offer.notes) or 'not built in'}); install one that has, or set distributed.device=cpu"
        )
    index = 0 if count == 1 else local_rank * (count // local_size)
    which = "the one that is visible" if count == 1 else f"{count} visible, number {index} by local rank"
    return Choice(kind=kind, index=index, backend=backend, reason=f"{kind}: {which}; {backend or 'no backend needed'}")  # type: ignore[arg-type]


def _why_cpu(wanted: Wanted, offer: Offer) -> str:
    if wanted == "cpu":
        return "cpu: as distributed.device says"
    return f"cpu: torch {torch.__version__} sees no accelerator"


def bind(choice: Choice) -> None:
    """Make it this process's device. Before the process group: a collective of FSDP2 hangs otherwise (xccl)."""
    if choice.kind != "cpu":
        torch.get_device_module(choice.device).set_device(choice.index)


def bound_device(choice: Choice) -> torch.device | None:
    """What init_process_group takes as device_id: xccl needs it, or the first all-gather of FSDP2 hangs."""
    return choice.device if choice.kind == "xpu" else None


def new_mesh(kind: str, shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of all ranks on such devices, in their order. Collective."""
    with _unbound():
        return init_device_mesh(kind, shape, mesh_dim_names=names)


def lay_out(kind: str, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of all ranks on such devices, laid out so. Collective."""
    with _unbound():
        return DeviceMesh(kind, ranks, mesh_dim_names=names)


@contextmanager
def _unbound() -> Iterator[None]:
    """The group of all ranks is bound to no device: a new mesh would split a bound one, which xccl cannot."""
    group = dist.group.WORLD
    assert group is not None
    bound, group.bound_device_id = group.bound_device_id, None
    try:
        yield
    finally:
        group.bound_device_id = bound
