"""How blocks of a ring buffer get from one rank to others: a broadcast (gloo, xccl, MPI), or memory that they share."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from mas_hpc.distributed.many_keys import read_there, windows
from mas_hpc.distributed.mpi import load_mpi
from mas_hpc.errors import RolloutError

SHARED_FOLDER = "/dev/shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Who takes part: global ranks, and which of them this one is.

    Example: Members(rank=2, sender=0, receivers=(2, 3), timeout_s=300.0)
    """

    rank: int
    sender: int
    receivers: tuple[int, ...]
    timeout_s: float
    """Of each wait."""

    def __post_init__(self) -> None:
        assert self.sender not in self.receivers, "an engine beside the trainer shares its weights: nothing is sent"
        assert self.rank in self.all, f"rank {self.rank} takes no part"

    @property
    def all(self) -> tuple[int, ...]:
        """In ascending order."""
        return tuple(sorted((self.sender, *self.receivers)))

    @property
    def sends(self) -> bool:
        return self.rank == self.sender

    @property
    def peers(self) -> tuple[int, ...]:
        """Whom this rank exchanges blocks with."""
        return self.receivers if self.sends else (self.sender,)

    @contextmanager
    def waiting(self, what: str, peers: Sequence[int] | None = None) -> Iterator[None]:
        """Turn what a communication library reports while this rank waits into a RolloutError that names the peer."""
        ranks = ", ".join(map(str, self.peers if peers is None else peers))
        try:
            yield
        except RuntimeError as error:
            raise RolloutError(
                f"weight sync: rank {self.rank} waited for rank {ranks} to {what} (at most {self.timeout_s:g} s): {error}; "
                "look for the first error in that rank's log"
            ) from error


class Channel(Protocol):
    """Moves blocks in order. Sender and receivers post the same blocks; all methods but `release` are for both sides."""

    def ring(self, num_bytes: int) -> Tensor:
        """A buffer of at least that size, uint8, kept from one call to the next. Collective; no block is under way."""
        ...

    def post(self, block: Tensor) -> None:
        """Start moving a part of the ring."""
        ...

    def wait(self, count: int) -> None:
        """Return when the first `count` posted blocks have moved: the sender may overwrite them, a receiver may read them."""
        ...

    def release(self) -> None:
        """Receiver: the next block in order has been read."""
        ...

    def close(self) -> None:
        """Give the memory back. Collective."""
        ...


class GroupChannel:
    """Broadcast in a process group (gloo: host memory; xccl: `device`), made once with `new_group(members.all)`."""

    def __init__(self, members: Members, group: dist.ProcessGroup, *, device: torch.device | None = None) -> None:
        self._members, self._group, self._device = members, group, device
        self._ring = torch.empty(0, dtype=torch.uint8, device=device)
        self._works: list[dist.Work] = []
        self._num_done = 0

    def ring(self, num_bytes: int) -> Tensor:
        """See Channel."""
        self._works, self._num_done = [], 0
        if len(self._ring) < num_bytes:
            self._ring = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._ring

    def post(self, block: Tensor) -> None:
        """See Channel."""
        with self._members.waiting("connect"):
            work = dist.broadcast(block, self._members.sender, group=self._group, async_op=True)
        assert work is not None
        self._works.append(work)

    def wait(self, count: int) -> None:
        """See Channel."""
        what = "receive weights" if self._members.sends else "send weights"
        for work in self._works[self._num_done : count]:
            with self._members.waiting(what):
                work.wait(timedelta(seconds=self._members.timeout_s))
        self._num_done = max(self._num_done, count)

    def release(self) -> None:
        """See Channel."""

    def close(self) -> None:
        """See Channel."""


class MpiChannel:
    """MPI broadcast on buffers, without pickles; `ranks` is a communicator that contains the members."""

    def __init__(self, members: Members, ranks: Any) -> None:
        self._members = members
        self._comm = _members_only(members, ranks)
        self._ring = torch.empty(0, dtype=torch.uint8)
        self._requests: list[Any] = []
        self._num_done = 0

    def ring(self, num_bytes: int) -> Tensor:
        """See Channel."""
        self._requests, self._num_done = [], 0
        if len(self._ring) < num_bytes:
            self._ring = torch.empty(num_bytes, dtype=torch.uint8)
        return self._ring

    def post(self, block: Tensor) -> None:
        """See Channel."""
        root = self._members.all.index(self._members.sender)
        self._requests.append(self._comm.Ibcast(block.numpy(), root=root))

    def wait(self, count: int) -> None:
        """See Channel."""
        deadline_s = time.monotonic() + self._members.timeout_s
        for request in self._requests[self._num_done : count]:
            with self._members.waiting("move a block"):
                while not request.Test():
                    if time.monotonic() > deadline_s:
                        raise RuntimeError("timed out")
                    os.sched_yield()
        self._num_done = max(self._num_done, count)

    def release(self) -> None:
        """See Channel."""

    def close(self) -> None:
        """See Channel."""
        self._comm.Free()


class SharedChannel:
    """Memory that all members of one host see: the sender copies in, receivers read there. Nothing else is moved.

    Small messages of a gloo group say which blocks are there and which have been read, so nobody spins. `memory` gives
    a shared buffer of a size and how to free it: window_memory or file_memory.
    """

    def __init__(
        self, members: Members, group: dist.ProcessGroup, memory: Callable[[int], tuple[Tensor, Callable[[], None]]]
    ) -> None:  # fmt: skip
        self._members, self._group, self._memory = members, group, memory
        self._ring = torch.empty(0, dtype=torch.uint8)
        self._free: Callable[[], None] = lambda: None
        self._num_posted = self._num_done = 0
        self._message = torch.zeros(1, dtype=torch.uint8)  # that it comes is all it says
        self._sent: list[dist.Work] = []

    def ring(self, num_bytes: int) -> Tensor:
        """See Channel."""
        self._num_posted = self._num_done = 0
        if len(self._ring) < num_bytes:
            self.close()
            self._ring, self._free = self._memory(num_bytes)
        return self._ring

    def post(self, block: Tensor) -> None:
        """See Channel."""
        self._num_posted += 1
        if self._members.sends:
            self._tell()

    def wait(self, count: int) -> None:
        """See Channel."""
        assert count <= self._num_posted
        what = "read weights" if self._members.sends else "write weights"
        while self._num_done < count:
            for peer in self._members.peers:
                with self._members.waiting(what, [peer]):
                    work = dist.irecv(self._message, peer, group=self._group)
                    assert work is not None
                    work.wait(timedelta(seconds=self._members.timeout_s))
            self._num_done += 1

    def release(self) -> None:
        """See Channel."""
        self._tell()

    def close(self) -> None:
        """See Channel."""
        for work in self._sent:
            with self._members.waiting("read messages"):
                work.wait(timedelta(seconds=self._members.timeout_s))
        self._sent = []
        self._ring = torch.empty(0, dtype=torch.uint8)
        self._free()
        self._free = lambda: None

    def _tell(self) -> None:
        self._sent = [work for work in self._sent if not work.is_completed()]
        for peer in self._members.peers:
            with self._members.waiting("read messages", [peer]):
                work = dist.isend(self._message, peer, group=self._group)
            assert work is not None
            self._sent.append(work)


def window_memory(members: Members, ranks: Any) -> Callable[[int], tuple[Tensor, Callable[[], None]]]:
    """Memory in an MPI shared window (Win.Allocate_shared); `ranks` contains the members, which are on one host."""
    comm = _members_only(members, ranks)

    def allocate(num_bytes: int) -> tuple[Tensor, Callable[[], None]]:
        window = load_mpi().Win.Allocate_shared(num_bytes if members.sends else 0, 1, comm=comm)
        memory, _ = window.Shared_query(members.all.index(members.sender))
        return torch.frombuffer(memory, dtype=torch.uint8), window.Free

    return allocate


def file_memory(members: Members, store: Store) -> Callable[[int], tuple[Tensor, Callable[[], None]]]:
    """The same without MPI, for torchrun: a file in /dev/shm that is unlinked as soon as all members have opened it."""
    count = 0

    def allocate(num_bytes: int) -> tuple[Tensor, Callable[[], None]]:
        nonlocal count
        count += 1
        path_key, opened_key = f"memory/{count}/path", f"memory/{count}/opened"
        if members.sends:
            file, path = _reserve(num_bytes)
            store.set(path_key, path)
        else:
            path = read_text(store, path_key, members, members.sender, "make shared memory")
            file = os.open(path, os.O_RDWR)
            store.set(f"{opened_key}/{members.rank}", "")
        memory = mmap.mmap(file, num_bytes)
        os.close(file)
        if members.sends:
            for peer in members.receivers:
                read_text(store, f"{opened_key}/{peer}", members, peer, "open shared memory")
            os.unlink(path)
        return torch.frombuffer(memory, dtype=torch.uint8), lambda: None  # unmapped with the last view

    return allocate


def read_text(store: Store, key: str, members: Members, peer: int, what: str) -> str:
    """What `peer` has written, or will within the timeout. Raises RolloutError that names it."""
    with members.waiting(what, [peer]):
        store.wait([key], timedelta(seconds=members.timeout_s))
        return store.get(key).decode()


def read_texts(store: Store, name: str, members: Members, what: str) -> dict[int, str]:
    """`read_text` of `name`/<rank> of every receiver, by rank, in few messages."""
    end_s = time.monotonic() + members.timeout_s
    for ranks in windows(members.receivers):
        keys = [f"{name}/{rank}" for rank in ranks]
        try:
            store.wait(keys, timedelta(seconds=max(0.001, end_s - time.monotonic())))
        except dist.DistStoreError as error:
            missing = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
            if missing:
                with members.waiting(what, missing):
                    raise error
    found = read_there(store, [f"{name}/{rank}" for rank in members.receivers])
    return {int(key.rpartition("/")[2]): text.decode() for key, text in found.items()}


def _reserve(num_bytes: int) -> tuple[int, str]:
    """A file in shared memory with all its pages; without them a write would end the process."""
    file, path = tempfile.mkstemp(prefix="mas_hpc_", dir=SHARED_FOLDER)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.unlink(path)
        raise RolloutError(
            f"{SHARED_FOLDER} has no room for {num_bytes >> 20} MiB ({error}): give it more (docker run --shm-size), or "
            "send weights by broadcast"
        ) from error
    return file, path


def _members_only(members: Members, ranks: Any) -> Any:
    """A communicator of the members alone. Collective among them."""
    return ranks.Create_group(ranks.group.Incl(list(members.all)))
