"""Ports of this node: whether one can be listened at, and reached. Every wait ends."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from mas_hpc.distributed.launchers import find_place
from mas_hpc.doctor.facts import Reach

TIMEOUT_S = 2.0
LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def reach_all(environment: Mapping[str, str], host_suffix: str) -> tuple[Reach, ...]:
    """The loopback address, this node's own name (with the suffix of a site's fast network), and MASTER_PORT where it is free.

    A launcher's ranks have somebody at MASTER_PORT, whom this must not disturb.
    """
    name = socket.gethostname()
    found = [reach("loopback", LOOPBACK, LOOPBACK), reach("own name", f"{name.partition('.')[0]}{host_suffix}", "")]
    if "MASTER_PORT" in environment and find_place(environment) is None:
        found.append(reach("MASTER_PORT", LOOPBACK, "", environment["MASTER_PORT"]))
    return tuple(found)


def reach(what: str, address: str, interface: str, port: str = "0") -> Reach:
    """Listen at a port of an interface (empty: all), 0 being any free one, and connect to it by the address."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a store does
        try:
            listener.bind((interface, int(port)))
            listener.listen(1)
        except (OSError, ValueError, OverflowError) as error:
            return Reach(what=what, address=f"{address}:{port}", problem=f"nobody can listen there: {error}")
        place = f"{address}:{listener.getsockname()[1]}"
        try:
            with socket.create_connection((address, listener.getsockname()[1]), TIMEOUT_S):
                return Reach(what=what, address=place)
        except OSError as error:
            return Reach(what=what, address=place, problem=f"nobody reaches it: {error}")
