"""Messages between ranks that are sent and received without waiting. Two transports, one contract: gloo and MPI."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.world import World
from mas_hpc.errors import LostPeerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A message that has arrived.

    Example: Envelope(source=1, payload=b"...")
    """

    source: int
    payload: bytes


class Transport(Protocol):
    """Messages arrive whole, once, and in the order in which one rank sent them to another. For use by one thread.

    Nothing waits, so a rank with nothing to do sleeps 0.1 ms or so between calls of `receive`: one that spins instead takes
    the core, and the interpreter lock, from those who bring its messages (14 ms of latency instead of 0.2 ms).
    """

    rank: int
    size: int

    def send(self, target: int, payload: bytes) -> None:
        """Return at once; target is another rank. Raises LostPeerError, naming the peer, when one cannot be reached."""
        ...

    def receive(self) -> list[Envelope]:
        """Everything that has arrived since; never waits. Raises LostPeerError, naming the peer, when one has broken down."""
        ...

    def close(self) -> None:
        """Collective: after it nothing is sent, and what was sent has arrived: a last `receive` returns it.

        Raises LostPeerError that names the ranks which do not come in time.
        """
        ...


def open_transport(world: World, *, timeout_s: float) -> Transport:
    """MPI under an MPI launcher, gloo otherwise. Collective; the world is connected and has several ranks.

    timeout_s: a message on its way that makes no progress for so long is an error, as is a rank that does not come to open
    or close.
    Raises LostPeerError that names the ranks which do not come.
    """
    assert world.store is not None, "a transport needs a connected world of several ranks"
    number = world.store.add(f"transport/opened/{world.rank}", 1)
    arrive(world.store, f"transport/{number}", world.rank)
    missing = absent(world.store, f"transport/{number}", world.size, timedelta(seconds=timeout_s))
    if missing:
        raise LostPeerError(f"{peers(world, missing)} did not open the transport within {timeout_s} s of rank {world.rank}")
    if world.launcher == "mpi":
        from mas_hpc.distributed.transport_mpi import MPITransport

        return MPITransport(world, timeout_s=timeout_s)
    from mas_hpc.distributed.transport_gloo import GlooTransport

    return GlooTransport(world, timeout_s=timeout_s)


def peers(world: World, ranks: list[int]) -> str:
    """Ranks with their hosts, for messages."""
    return ", ".join(f"rank {rank} on {world.hosts[rank]}" for rank in ranks)
