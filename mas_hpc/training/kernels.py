"""Which kernels compute the loss on a device."""

from __future__ import annotations

from mas_hpc_kernels import BackendName, KernelError, choose
from rich.console import Console

from mas_hpc.errors import ConfigError


def report_kernels(wanted: BackendName, device_type: str, console: Console) -> None:
    """Say which backend it is and why. Raises ConfigError for a named one that cannot run there."""
    try:
        choice = choose(wanted, device_type)
    except KernelError as error:
        raise ConfigError(f"kernels.backend={wanted}: {error}; or leave it at auto") from None
    console.print(f"kernels of the loss: {choice.name} ({choice.reason})", highlight=False)
