"""One of three ranks that hold a transport to its contract. Run by test_transport.py under each launcher."""

from __future__ import annotations

import time
from datetime import timedelta

from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.transport import Envelope, Transport, open_transport
from mas_hpc.distributed.world import World, connected

MIB = 1 << 20
SIZES = (0, 1, 16383, 16384, 16385, 3, MIB, 0, 2)  # around the size up to which gloo sends one message for ours
LARGE = 64 * MIB
DEADLINE_S = 60


def payload(source: int, target: int, number: int) -> bytes:
    """Bytes that differ by sender, receiver and number."""
    pattern = bytes([source, target, number, *range(241)])
    return (pattern * (SIZES[number] // len(pattern) + 1))[: SIZES[number]]


def gather(transport: Transport, count: int) -> dict[int, list[bytes]]:
    """The next `count` messages of all peers together, by sender."""
    found: list[Envelope] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} messages came"
        found += transport.receive()
        time.sleep(1e-4)
    return {source: [e.payload for e in found if e.source == source] for source in range(transport.size)}


def meet(world: World, name: str) -> None:
    """All ranks are here before any goes on; nothing is sent or received meanwhile."""
    assert world.store is not None
    arrive(world.store, name, world.rank)
    assert absent(world.store, name, world.size, timedelta(seconds=DEADLINE_S)) == []


def check_all_pairs(world: World, transport: Transport) -> None:
    """Every size from everybody to everybody, all sent before anybody receives: whole, once, in order."""
    peers = [rank for rank in range(world.size) if rank != world.rank]
    assert transport.receive() == []
    meet(world, "opened")
    for number in range(len(SIZES)):
        for peer in peers:
            transport.send(peer, payload(world.rank, peer, number))
    meet(world, "sent")
    received = gather(transport, len(SIZES) * len(peers))
    for peer in peers:
        assert received[peer] == [payload(peer, world.rank, number) for number in range(len(SIZES))], peer
    assert transport.receive() == []


def check_large(world: World, transport: Transport) -> None:
    """64 MiB each way between two ranks, and a short message that may not overtake it."""
    if world.rank < 2:
        other = 1 - world.rank
        large = payload(world.rank, other, 6) * (LARGE // MIB)
        transport.send(other, large)
        transport.send(other, b"after")
        first, second = gather(transport, 2)[other]
        assert first == payload(other, world.rank, 6) * (LARGE // MIB)
        assert second == b"after"


def check_close(world: World, transport: Transport) -> None:
    """What was sent right before the end arrives, and nobody has to receive it first."""
    if world.rank != 2:
        transport.send(2, b"last")
    transport.close()
    expected = [Envelope(source=0, payload=b"last"), Envelope(source=1, payload=b"last")] if world.rank == 2 else []
    assert sorted(transport.receive(), key=lambda envelope: envelope.source) == expected


if __name__ == "__main__":
    with connected(World.from_env()) as world:
        for _ in range(2):  # a second transport is independent of the first
            transport = open_transport(world, timeout_s=DEADLINE_S)
            assert (transport.rank, transport.size) == (world.rank, world.size)
            check_close(world, transport)
        transport = open_transport(world, timeout_s=DEADLINE_S)
        check_all_pairs(world, transport)
        check_large(world, transport)
        transport.close()
        print(f"{type(transport).__name__} of rank {world.rank} holds on {world.hosts[world.rank]}", flush=True)
