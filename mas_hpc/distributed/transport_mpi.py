"""Messages over MPI, for ranks of mpiexec: buffers without pickles, on a communicator of their own.

A rank that dies ends the whole job, so its peers see no error here. Messages move inside calls of MPI: a rank that calls
neither `send` nor `receive` for a while keeps its large messages, those that MPI does not buffer, waiting.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mas_hpc.distributed.mpi import load_mpi
from mas_hpc.distributed.transport import Envelope, peers
from mas_hpc.distributed.world import World
from mas_hpc.errors import LostPeerError

_DATA, _EMPTY, _END = range(3)
"""Tags. No message has zero bytes: those of the last two carry one that says nothing."""
_NOTHING = b"\0"
_PAUSE_S = 0.001


class _Lane:
    """What is on its way between this rank and one peer in one direction, in order."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Any, int, Any]] = deque()
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, request: Any, tag: int, buffer: Any) -> None:
        self._since = self._since if self._messages else time.monotonic()
        self._messages.append((request, tag, buffer))

    def pop_complete(self) -> list[tuple[int, Any]]:
        """(tag, buffer) of the messages that are complete, up to the first that is not."""
        complete = []
        while self._messages and self._messages[0][0].Test():
            _, tag, buffer = self._messages.popleft()
            complete.append((tag, buffer))
            self._since = time.monotonic()
        return complete

    def waits_longer_than(self, timeout_s: float) -> bool:
        return bool(self._messages) and time.monotonic() - self._since > timeout_s


class MPITransport:
    """See Transport; made by open_transport."""

    def __init__(self, world: World, *, timeout_s: float) -> None:
        self.rank, self.size = world.rank, world.size
        self._world = world
        self._timeout_s = timeout_s
        self._mpi = load_mpi()
        self._ranks = self._mpi.COMM_WORLD.Dup()
        self._peers = [rank for rank in range(world.size) if rank != world.rank]
        self._outgoing = {peer: _Lane() for peer in self._peers}
        self._incoming = {peer: _Lane() for peer in self._peers}
        self._arrived: list[Envelope] = []
        self._ended: set[int] = set()

    def send(self, target: int, payload: bytes) -> None:
        """See Transport."""
        assert target in self._outgoing, target
        self._post(target, *((_DATA, payload) if payload else (_EMPTY, _NOTHING)))
        self._advance()

    def receive(self) -> list[Envelope]:
        """See Transport."""
        if len(self._ended) < len(self._peers):
            self._advance()
        envelopes, self._arrived = self._arrived, []
        return envelopes

    def close(self) -> None:
        """See Transport."""
        for peer in self._peers:
            self._post(peer, _END, _NOTHING)
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._advance()
            silent = [peer for peer in self._peers if peer not in self._ended or self._outgoing[peer]]
            if not silent:
                break
            if time.monotonic() > deadline:
                raise LostPeerError(f"{peers(self._world, silent)} did not close the transport within {self._timeout_s} s")
            time.sleep(_PAUSE_S)
        self._ranks.Free()

    def _post(self, target: int, tag: int, payload: bytes) -> None:
        request = self._ranks.Isend([payload, self._mpi.BYTE], dest=target, tag=tag)
        self._outgoing[target].add(request, tag, payload)

    def _advance(self) -> None:
        """Start to receive what has been announced, take in what is complete, let go of what was sent."""
        status = self._mpi.Status()
        while (message := self._ranks.Improbe(status=status)) is not None:
            buffer = np.empty(status.Get_count(self._mpi.BYTE), dtype=np.uint8)
            request = message.Irecv([buffer, self._mpi.BYTE])
            self._incoming[status.Get_source()].add(request, status.Get_tag(), buffer)
        for peer in self._peers:
            for tag, buffer in self._incoming[peer].pop_complete():
                self._take(peer, tag, buffer)
            self._outgoing[peer].pop_complete()
            if self._outgoing[peer].waits_longer_than(self._timeout_s) or self._incoming[peer].waits_longer_than(
                self._timeout_s
            ):
                raise LostPeerError(
                    f"no progress with a message to or from {peers(self._world, [peer])} for {self._timeout_s} s"
                )

    def _take(self, source: int, tag: int, buffer: NDArray[np.uint8]) -> None:
        if tag == _END:
            self._ended.add(source)
        else:
            self._arrived.append(Envelope(source=source, payload=buffer.tobytes() if tag == _DATA else b""))
