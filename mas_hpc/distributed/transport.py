"""Messages between ranks that are sent and received without waiting. Two transports, one contract: gloo and MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A message that has arrived.

    Example: Envelope(source=1, payload=b"...")
    """

    source: int
    payload: bytes


class Transport(Protocol):
    """Messages arrive whole, once, and in the order in which one rank sent them to another."""

    rank: int
    size: int

    def send(self, target: int, payload: bytes) -> None:
        """Return at once; the payload may be reused. Raises RolloutError, naming the peer, when it cannot be reached."""
        ...

    def receive(self) -> list[Envelope]:
        """Everything that has arrived since; never waits. Raises RolloutError, naming the peer, when one has broken down."""
        ...

    def close(self) -> None:
        """Collective: after it nothing is sent, and what was sent has arrived."""
        ...
