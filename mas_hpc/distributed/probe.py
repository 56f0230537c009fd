"""How fast, and how right, the collectives of all ranks are, and how fast one device computes and copies."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from mas_hpc.distributed.meeting import absent, arrive
from mas_hpc.distributed.world import World
from mas_hpc.errors import LostPeerError

Collective = Literal["broadcast", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_near", "send_far"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)
SIZES_BYTES = (1 << 10, 1 << 15, 1 << 20, 1 << 24)
"""From where latency is all to where bandwidth is."""
TIMEOUT = timedelta(seconds=60)
"""Of one call and of the wait before it; the first call of a group opens its connections."""
_PERIOD, _STRIDE = 61, 7
"""Element i of rank r is (i + 7 r) mod 61: ranks and places differ, and sums over 250,000 ranks are exact in float32."""
_FEW_CALLS_BYTES = 1 << 20
_MAX_CALLS = 20
# Their other names, all_gather_single and reduce_scatter_single, are those of the newest torch alone.
warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTime:
    """One collective of all ranks, with one size.

    Example: CollectiveTime(collective="all_reduce", bytes=1 << 20, ranks=2, seconds=0.002, correct=True)
    """

    collective: Collective
    bytes: int
    """Of the whole vector: what is reduced or broadcast, what one rank has gathered or scattered or sent in all, a message."""
    ranks: int
    seconds: float
    """Of one call: the median, over repeats, of the slowest rank; of a message: half of there and back."""
    correct: bool
    """Whether every rank has got the right values, before and after the repeats."""

    @property
    def bus_gb_per_s(self) -> float:
        """What the links of one rank carry, in one direction: comparable between collectives and numbers of ranks."""
        share = (self.ranks - 1) / self.ranks
        parts = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}
        return self.bytes * parts.get(self.collective, 1.0) / self.seconds / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeed:
    """What one rank's device does while those of all other ranks do the same.

    Example: DeviceSpeed(device="xpu:0", dtype="bfloat16", gemm_tflops=207.0, memory_gb_per_s=1000.0)
    """

    device: str
    dtype: str
    gemm_tflops: float
    memory_gb_per_s: float
    """Of a triad, a + s b into c: two reads and a write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A collective on buffers of its own."""

    source: Tensor
    target: Tensor
    """The same as source where the collective works in place."""
    expected: Tensor
    steps: tuple[Callable[[], dist.Work | None], ...]
    """One after the other; empty where this rank has no part."""

    def is_right(self, source: Tensor, timeout: timedelta) -> bool:
        """Whether one call of it does with these values what it should."""
        self.source.copy_(source)
        self.run(timeout)
        return torch.equal(self.target, self.expected)

    def run(self, timeout: timedelta) -> None:
        """One call, to its end as far as the host can see it."""
        for step in self.steps:
            if work := step():
                work.wait(timeout)


def measure_collectives(
    world: World, sizes_bytes: Sequence[int] = SIZES_BYTES, repeats: int = 5, *,
    collectives: Sequence[Collective] = COLLECTIVES, timeout: timedelta = TIMEOUT,
) -> tuple[CollectiveTime, ...]:  # fmt: skip
    """Each collective with each size on the group of all ranks, on their devices; none for a world of one. Collective.

    Sizes are rounded up to a number of float32 that all ranks share evenly. The same result on every rank. Raises
    LostPeerError that names the ranks which do not come within `timeout`, or the collective that does not return.
    """
    if world.size == 1:
        return ()
    cases = [(collective, size_bytes) for collective in collectives for size_bytes in sizes_bytes]
    return tuple(_measure(world, collective, size_bytes, repeats, timeout) for collective, size_bytes in cases)


def _measure(world: World, collective: Collective, size_bytes: int, repeats: int, timeout: timedelta) -> CollectiveTime:
    count = world.size * max(1, -(-size_bytes // (4 * world.size)))
    num_calls = max(1, min(_MAX_CALLS, _FEW_CALLS_BYTES // size_bytes))
    name = f"{collective} of {4 * count} bytes"
    assert world.store is not None, "the world is not connected"
    number = world.store.add(f"probe/{world.rank}", 1)
    arrive(world.store, f"probe/{number}", world.rank)
    try:
        call = _CALLS[collective](world, count)
        values = _values(world.rank, count, world.device)[: call.source.numel()]
        is_right = call.is_right(values, timeout)
        slowest = _times(world, call, num_calls, repeats, timeout)
        is_right &= call.is_right(values, timeout)
        is_right = _extreme(world, [float(is_right)], dist.ReduceOp.MIN, timeout) == [1.0]
    except RuntimeError as error:
        raise _lost(world, number, name, error, timeout) from error
    world.watch.moved()
    messages = 2 if collective.startswith("send") else 1
    return CollectiveTime(
        collective=collective, bytes=4 * count, ranks=world.size, seconds=statistics.median(slowest) / messages,
        correct=is_right,
    )  # fmt: skip


def _times(world: World, call: _Call, num_calls: int, repeats: int, timeout: timedelta) -> list[float]:
    """Seconds of a call of the slowest rank, by repeat; on zeros, which a sum in place leaves as they are."""
    call.source.zero_()
    seconds = []
    for _ in range(repeats):
        synchronize(world.device)
        meet(world, timeout)
        start = time.perf_counter()
        for _ in range(num_calls):
            call.run(timeout)
        synchronize(world.device)
        seconds.append((time.perf_counter() - start) / num_calls)
    return _extreme(world, seconds, dist.ReduceOp.MAX, timeout)


def _extreme(world: World, values: list[float], which: dist.ReduceOp.RedOpType, timeout: timedelta) -> list[float]:
    """The largest or smallest of all ranks, place by place."""
    found = torch.tensor(values, dtype=torch.float64)
    work = dist.all_reduce(found, which, group=world.control, async_op=True)
    assert work is not None
    work.wait(timeout)
    return found.tolist()


def meet(world: World, timeout: timedelta = TIMEOUT) -> None:
    """Wait for all ranks. Raises RuntimeError, as torch does, when they do not all come."""
    if world.size > 1:
        dist.barrier(group=world.control, async_op=True).wait(timeout)


def _lost(world: World, number: int, name: str, error: RuntimeError, timeout: timedelta) -> LostPeerError:
    """Who has not come to the call that has failed here, or that all have, and it does not return."""
    assert world.store is not None
    missing = absent(world.store, f"probe/{number}", world.size, timedelta(seconds=1))
    reason = str(error).splitlines()[0]
    if missing:
        who = ", ".join(f"rank {rank} on {world.hosts[rank]}" for rank in missing)
        return LostPeerError(f"{name}: {who} did not come to it within {timeout} of rank {world.rank} ({reason})")
    here = f"rank {world.rank} on {world.hosts[world.rank]}"
    return LostPeerError(f"{name}: all ranks came to it, and it does not return on {here} ({reason}); look at the network")


# ---- what each collective does, and what has to come out of it


def _values(rank: int, count: int, device: torch.device) -> Tensor:
    return ((torch.arange(count, device=device) + _STRIDE * rank) % _PERIOD).float()


def _sums(size: int, count: int, device: torch.device) -> Tensor:
    """Of all ranks' values, by counting how many ranks are alike."""
    alike = torch.bincount(_STRIDE * torch.arange(size) % _PERIOD, minlength=_PERIOD)
    residues = torch.arange(_PERIOD)
    table = ((residues[:, None] + residues) % _PERIOD * alike).sum(1).float()
    return table.to(device)[torch.arange(count, device=device) % _PERIOD]


def _broadcast(world: World, count: int) -> _Call:
    data = torch.empty(count, device=world.device)
    expected = _values(0, count, world.device)
    return _Call(source=data, target=data, expected=expected, steps=(lambda: dist.broadcast(data, 0, async_op=True),))


def _all_reduce(world: World, count: int) -> _Call:
    data = torch.empty(count, device=world.device)
    expected = _sums(world.size, count, world.device)
    return _Call(source=data, target=data, expected=expected, steps=(lambda: dist.all_reduce(data, async_op=True),))


def _all_gather(world: World, count: int) -> _Call:
    part = count // world.size
    source, target = torch.empty(part, device=world.device), torch.empty(count, device=world.device)
    expected = torch.cat([_values(rank, part, world.device) for rank in range(world.size)])
    return _Call(
        source=source, target=target, expected=expected,
        steps=(lambda: dist.all_gather_into_tensor(target, source, async_op=True),),
    )  # fmt: skip


def _reduce_scatter(world: World, count: int) -> _Call:
    source, target = torch.empty(count, device=world.device), torch.empty(count // world.size, device=world.device)
    expected = _sums(world.size, count, world.device).view(world.size, -1)[world.rank]
    return _Call(
        source=source, target=target, expected=expected,
        steps=(lambda: dist.reduce_scatter_tensor(target, source, async_op=True),),
    )  # fmt: skip


def _all_to_all(world: World, count: int) -> _Call:
    """No part is empty: a message of no bytes hangs on some fabrics."""
    source, target = torch.empty(count, device=world.device), torch.empty(count, device=world.device)
    mine = [_values(rank, count, world.device).view(world.size, -1)[world.rank] for rank in range(world.size)]
    return _Call(
        source=source, target=target, expected=torch.cat(mine),
        steps=(lambda: dist.all_to_all_single(target, source, async_op=True),),
    )  # fmt: skip


def _send_near(world: World, count: int) -> _Call:
    return _there_and_back(world, count, world.rank ^ 1)


def _send_far(world: World, count: int) -> _Call:
    half = world.size // 2
    return _there_and_back(world, count, (world.rank + half) % (2 * half) if world.rank < 2 * half else world.size)


def _there_and_back(world: World, count: int, peer: int) -> _Call:
    """The lower rank of a pair sends, the other sends that back; the last of an odd number has nobody: a rank beyond."""
    data, held = torch.empty(count, device=world.device), torch.empty(count, device=world.device)
    first, second = min(world.rank, peer), max(world.rank, peer)
    if second == world.size:
        return _Call(source=data, target=data, expected=_values(world.rank, count, world.device), steps=())
    if world.rank == first:
        steps = (lambda: dist.isend(data, peer), lambda: dist.irecv(held, peer))
    else:
        steps = (lambda: dist.irecv(held, peer), lambda: dist.isend(held, peer))
    return _Call(source=data, target=held, expected=_values(first, count, world.device), steps=steps)


_CALLS: dict[Collective, Callable[[World, int], _Call]] = {
    "broadcast": _broadcast,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send_near": _send_near,
    "send_far": _send_far,
}


# ---- one device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def measure_device(world: World, repeats: int = 5) -> DeviceSpeed:
    """Of this rank's device, with those of all ranks at work. Collective.

    Matrices are in the type that models are trained in: float32 on a CPU, bfloat16 elsewhere.
    """
    is_cpu = world.device.type == "cpu"
    dtype, side, count = (torch.float32, 1024, 1 << 25) if is_cpu else (torch.bfloat16, 8192, 1 << 28)
    a, b = (torch.randn(side, side, device=world.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    gemm_s = _seconds(world, repeats, lambda: torch.mm(a, b, out=product))
    x, y, z = (torch.ones(count, device=world.device) for _ in range(3))
    triad_s = _seconds(world, repeats, lambda: torch.add(x, y, alpha=3.0, out=z))
    return DeviceSpeed(
        device=str(world.device), dtype=str(dtype).removeprefix("torch."), gemm_tflops=2 * side**3 / gemm_s / 1e12,
        memory_gb_per_s=3 * 4 * count / triad_s / 1e9,
    )  # fmt: skip


def _seconds(world: World, repeats: int, work: Callable[[], object]) -> float:
    """The median; all ranks begin together."""
    work()
    seconds = []
    for _ in range(repeats):
        synchronize(world.device)
        meet(world)
        start = time.perf_counter()
        work()
        synchronize(world.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---- what goes wrong in silence


def wait_ends(world: World, timeout: timedelta = timedelta(seconds=1)) -> float | None:
    """Wait for a message that nobody sends, over a gloo group of its own: seconds until that was an error. Collective.

    None when it was not: a rank that is lost would be waited for, for ever.
    """
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    start = time.perf_counter()
    work = dist.irecv(torch.zeros(1), (world.rank + 1) % world.size, group=group)
    assert work is not None
    try:
        work.wait(timeout)
    except RuntimeError:
        return time.perf_counter() - start
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device that nobody has, as its driver counts them; None for a CPU.

    Raises RuntimeError, as torch does, where the driver does not tell (Level Zero: ZES_ENABLE_SYSMAN=1).
    """
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def measure_leak(world: World, rounds: int = 20, timeout: timedelta = TIMEOUT) -> int | None:
    """Bytes that the device has lost after rounds of all-gathers into fresh memory and empty_cache. Collective.

    The allocator does not see such a loss. None for a CPU. Raises what free_memory raises.
    """
    if free_memory(world.device) is None:
        return None
    source = torch.ones(1 << 20, device=world.device)
    for number in range(rounds + 1):
        target = torch.empty(world.size << 20, device=world.device)
        if work := dist.all_gather_into_tensor(target, source, async_op=True):
            work.wait(timeout)
        synchronize(world.device)
        del target, work
        torch.get_device_module(world.device).empty_cache()
        if number == 0:  # the first has opened connections and buffers
            before = free_memory(world.device)
    after = free_memory(world.device)
    assert before is not None and after is not None
    return max(0, before - after)
