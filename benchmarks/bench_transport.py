"""Messages between two ranks: ours, which never wait, against the blocking calls of the libraries under them.

Starts its own ranks: two of torchrun for gloo, two of mpiexec for MPI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from reporting import ROOT, Row, report

from mas_hpc.distributed.transport import Transport, open_transport
from mas_hpc.distributed.world import World, connected

SIZES = {"4 KiB": (4 << 10, 200), "1 MiB": (1 << 20, 40), "64 MiB": (64 << 20, 5)}
"""Bytes of a message, and how many there-and-back exchanges are timed."""
ROUNDS = 3
PAUSE_S = 1e-4
NOTES = {
    "work": "two ranks of one host send a message there and back; 4 KiB: median time of one way in microseconds; "
    "larger: bytes over that time in GB/s",
    "ours": f"send, then receive until it returns the message, asleep for {PAUSE_S * 1e6:.0f} us between calls, "
    "as a rank without work is",
    "peers": "buffer: blocking send and recv between buffers of known size that are used again; "
    "objects: the pickling calls of the same library, which carry bytes of any size, as ours do",
    "alternation": f"median of {ROUNDS} rounds (ours, buffer, objects, ours, ...), the peer on the same ranks",
    "load": "cores shared with other work: MPI spins while it waits, which shows in its blocking calls",
    "target": "not slower than half of the pickling calls: the price of never waiting is two wake-ups of a sleeping rank",
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a message gets to the other rank and back.

    Example: Way(peer="mpi4py send/recv, pickled", send=send, receive=receive)
    """

    peer: str
    send: Callable[[], object]
    receive: Callable[[], object]


def wait_for(transport: Transport, size: int) -> None:
    """The next message, which must have this size."""
    while not (envelopes := transport.receive()):
        time.sleep(PAUSE_S)
    assert [len(envelope.payload) for envelope in envelopes] == [size]


def gloo_ways(other: int, payload: bytes) -> list[Way]:
    """Calls of torch.distributed."""
    tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    torch_version = version("torch")
    return [
        Way(
            peer=f"torch {torch_version} send/recv, buffer",
            send=lambda: dist.send(tensor, other),
            receive=lambda: dist.recv(tensor, other),
        ),
        Way(
            peer=f"torch {torch_version} send_object_list/recv_object_list",
            send=lambda: dist.send_object_list([payload], other),
            receive=lambda: dist.recv_object_list([None], other),
        ),
    ]


def mpi_ways(other: int, payload: bytes) -> list[Way]:
    """Calls of mpi4py."""
    from mpi4py import MPI

    ranks, buffer = MPI.COMM_WORLD, bytearray(payload)
    mpi4py_version = version("mpi4py")
    return [
        Way(
            peer=f"mpi4py {mpi4py_version} Send/Recv, buffer",
            send=lambda: ranks.Send([buffer, MPI.BYTE], other),
            receive=lambda: ranks.Recv([buffer, MPI.BYTE], other),
        ),
        Way(
            peer=f"mpi4py {mpi4py_version} send/recv, objects",
            send=lambda: ranks.send(payload, other),
            receive=lambda: ranks.recv(source=other),
        ),
    ]


def one_way_s(way: Way, *, first: bool, exchanges: int) -> float:
    """Median time of one way; both ranks measure, and rank 0's counts."""
    times = []
    for _ in range(exchanges):
        start = time.perf_counter()
        for step in (way.send, way.receive) if first else (way.receive, way.send):
            step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / 2


def measure(world: World, transport: Transport) -> list[Row]:
    """All sizes, ours against each peer."""
    other, rows = 1 - world.rank, []
    name = "MPI" if world.launcher == "mpi" else "gloo"
    for label, (size, exchanges) in SIZES.items():
        payload = bytes(size)
        ours = Way(peer="", send=lambda: transport.send(other, payload), receive=lambda: wait_for(transport, size))  # noqa: B023
        ways = [ours, *(mpi_ways if world.launcher == "mpi" else gloo_ways)(other, payload)]
        rounds = [[one_way_s(way, first=world.is_first, exchanges=exchanges) for way in ways] for _ in range(ROUNDS)]
        seconds = [statistics.median(column) for column in zip(*rounds, strict=True)]
        rows += [
            row(f"{name}, {label}", size, seconds[0], way.peer, theirs)
            for way, theirs in zip(ways[1:], seconds[1:], strict=True)
        ]
    return rows


def row(case: str, size: int, ours_s: float, peer: str, theirs_s: float) -> Row:
    """Latency of a small message, bandwidth of a large one. Larger ratios are better for us in both."""
    ours, theirs = (ours_s * 1e6, theirs_s * 1e6) if size < 1 << 20 else (size / ours_s / 1e9, size / theirs_s / 1e9)
    target = 0.0 if "buffer" in peer else 0.5
    metric = "us" if size < 1 << 20 else "gb_per_s"
    return Row(case=case, metric=metric, ours=ours, peer=peer, theirs=theirs, ratio=theirs_s / ours_s, target=target)


def rank_main() -> None:
    """One of two ranks; rank 0 prints the rows as JSON, last."""
    with connected(World.from_env()) as world:
        transport = open_transport(world, timeout_s=60)
        rows = measure(world, transport)
        transport.close()
        if world.is_first:
            print(json.dumps([asdict(row) for row in rows]), flush=True)


def run_ranks(launcher: list[str]) -> list[Row]:
    """Start two ranks of this file and read what the first prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [*launcher, __file__, "--rank"], check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return [Row(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Measure both transports, or with --rank be one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", action="store_true")
    if parser.parse_args().rank:
        rank_main()
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", sys.executable]
    print(report("transport", [*run_ranks(torchrun), *run_ranks(mpiexec)], notes=NOTES).name)


if __name__ == "__main__":
    main()
