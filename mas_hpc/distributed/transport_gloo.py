"""Messages over gloo's point-to-point operations, for ranks of torchrun.

Gloo says that an operation is complete only to a thread that waits for it (`is_completed` stays False), so one thread
listens to each peer and one waits for what was sent; they hold no lock of Python's while they wait. Gloo writes a message
when the receiver has asked for it, which the listeners have always done.
"""

from __future__ import annotations

import atexit
import time
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from mas_hpc.distributed.transport import Envelope, peers
from mas_hpc.distributed.world import World
from mas_hpc.errors import LostPeerError

_SIZE_BYTES = 8
_HEAD_BYTES = 16384
"""Of the payload, these travel with its size, so that a short message is one message of gloo."""
_HEAD, _REST, _NEVER = range(3)
"""Tags; nothing is ever sent with the last."""
_END = -1
_PAUSE_S = 0.1
_FOREVER = timedelta(days=365)
"""No operation of gloo's times out: that would break off those with all other peers as well."""


class GlooTransport:
    """See Transport; made by open_transport."""

    def __init__(self, world: World, *, timeout_s: float) -> None:
        self.rank, self.size = world.rank, world.size
        self._world = world
        self._timeout_s = timeout_s
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._broken = ""
        self._waits_for: tuple[int, float] | None = None
        self._arrived: SimpleQueue[Envelope] = SimpleQueue()
        self._on_their_way: SimpleQueue[tuple[int, list[dist.Work], list[Tensor]] | None] = SimpleQueue()
        self._peers = [rank for rank in range(world.size) if rank != world.rank]
        self._listeners = {peer: Thread(target=self._listen, args=(peer,), daemon=True) for peer in self._peers}
        self._watcher = Thread(target=self._watch, daemon=True)
        for thread in (*self._listeners.values(), self._watcher):
            thread.start()
        atexit.register(self._break_off)

    def send(self, target: int, payload: bytes) -> None:
        """See Transport."""
        assert target in self._peers, target
        self._check()
        self._post(target, len(payload), payload)

    def receive(self) -> list[Envelope]:
        """See Transport."""
        envelopes = [self._arrived.get() for _ in range(self._arrived.qsize())]
        if not envelopes:
            self._check()
        return envelopes

    def close(self) -> None:
        """See Transport."""
        self._check()
        for peer in self._peers:
            self._post(peer, _END, b"")
        self._on_their_way.put(None)
        deadline = time.monotonic() + self._timeout_s
        while silent := [peer for peer, thread in self._listeners.items() if thread.is_alive()]:
            self._listeners[silent[0]].join(_PAUSE_S)
            self._check()
            if time.monotonic() > deadline:
                raise LostPeerError(f"{peers(self._world, silent)} did not close the transport within {self._timeout_s} s")
        while self._watcher.is_alive():
            self._watcher.join(_PAUSE_S)
            self._check()
        atexit.unregister(self._break_off)
        dist.destroy_process_group(self._group)

    def _check(self) -> None:
        waits_for = self._waits_for
        if waits_for and time.monotonic() - waits_for[1] > self._timeout_s:
            self._break(waits_for[0], f"has not taken a message for {self._timeout_s} s")
        if self._broken:
            raise LostPeerError(self._broken)

    def _break(self, peer: int, how: str) -> None:
        self._broken = self._broken or f"{peers(self._world, [peer])} {how}"

    def _post(self, target: int, size: int, payload: bytes) -> None:
        parts = [bytearray(size.to_bytes(_SIZE_BYTES, "little", signed=True) + payload[:_HEAD_BYTES])]
        if len(payload) > _HEAD_BYTES:
            parts.append(bytearray(memoryview(payload)[_HEAD_BYTES:]))
        tensors = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
        try:
            works = [self._group.send([tensor], target, tag) for tensor, tag in zip(tensors, (_HEAD, _REST), strict=False)]
        except RuntimeError as error:
            self._break(target, f"cannot be reached: {error}")
            raise LostPeerError(self._broken) from error
        self._on_their_way.put((target, works, tensors))

    def _watch(self) -> None:
        while (sent := self._on_their_way.get()) is not None:
            target, works, _ = sent
            self._waits_for = target, time.monotonic()
            try:
                for work in works:
                    work.wait(_FOREVER)
            except RuntimeError as error:
                self._break(target, f"has broken down, or is out of reach: {error}")
                return
            self._waits_for = None

    def _listen(self, source: int) -> None:
        head = torch.empty(_SIZE_BYTES + _HEAD_BYTES, dtype=torch.uint8)
        try:
            while (payload := self._take(source, head)) is not None:
                self._arrived.put(Envelope(source=source, payload=payload))
        except RuntimeError as error:
            self._break(source, f"has broken down, or is out of reach: {error}")

    def _take(self, source: int, head: Tensor) -> bytes | None:
        """The next payload; None at the end. A message of gloo may be shorter than the tensor that receives it."""
        self._group.recv([head], source, _HEAD).wait(_FOREVER)
        size = int.from_bytes(head[:_SIZE_BYTES].numpy().tobytes(), "little", signed=True)
        if size == _END:
            return None
        first = head[_SIZE_BYTES : _SIZE_BYTES + min(size, _HEAD_BYTES)]
        if size <= _HEAD_BYTES:
            return first.numpy().tobytes()
        payload = torch.empty(size, dtype=torch.uint8)
        payload[:_HEAD_BYTES] = first
        self._group.recv([payload[_HEAD_BYTES:]], source, _REST).wait(_FOREVER)
        return payload.numpy().tobytes()

    def _break_off(self) -> None:
        """End the threads at the end of a process that has not closed: one that wakes later would end it with SIGABRT.

        An operation that times out makes gloo break off all others of the group.
        """
        self._on_their_way.put(None)
        for peer in self._peers:
            with suppress(RuntimeError):
                self._group.recv([torch.empty(1)], peer, _NEVER).wait(timedelta(milliseconds=1))
        for thread in (*self._listeners.values(), self._watcher):
            thread.join(_PAUSE_S)
