"""What all ranks try together, one trial after the other: collectives, speed, waits, a step on shards, a push of weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from mas_hpc.checksum import Checksum
from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.probe import CollectiveTime, DeviceSpeed, measure_leak, wait_ends
from mas_hpc.distributed.strategies import build_strategy
from mas_hpc.distributed.weight_source import HeldWeights, NamedTensor
from mas_hpc.distributed.weight_sync import WeightTransport, open_sync
from mas_hpc.distributed.world import World
from mas_hpc.errors import RolloutError
from mas_hpc.launch.finding import Finding

WIDTH = 64
"""Of the layer that takes a step."""
PUSHED = 1 << 20
"""Numbers, of four bytes, that are pushed as weights."""
PUSH_S, WAIT_S = 60.0, 5.0
"""A push may take so long; a wait of one second has to end within so many."""
LEAK_BYTES = 64 << 20
"""Beyond what the driver's own bookkeeping takes."""
SLOW = 0.5
"""Of the median: below it a device is said to be slow."""
MOST_NAMED = 8
"""Ranks or hosts that one finding names."""


def judge(world: World, name: str, *, problem: str, evidence: str, remedy: str) -> Finding:
    """One finding for all ranks, the same on each: ok with the evidence, or what went wrong where. Collective."""
    mine = [f"rank {world.rank} on {world.hosts[world.rank]}: {' '.join(problem.split())}"] if problem else []
    said = gather_lines(world, mine)
    if not said:
        return Finding(name=name, verdict="ok", evidence=evidence)
    return Finding(name=name, verdict="error", evidence=shorten(said), remedy=remedy)


def shorten(said: Sequence[str]) -> str:
    """The first of them, and how many there are."""
    more = f"; and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
    return "; ".join(said[:MOST_NAMED]) + more


def judge_collectives(times: Sequence[CollectiveTime], device: str) -> Finding:
    """Whether all values were right, which is the same on all ranks."""
    wrong = [f"{time.collective} of {time.bytes} bytes" for time in times if not time.correct]
    if wrong:
        remedy = "look for the node (fewer nodes at a time), then at the fabric's settings; never train on it"
        return Finding(name="collectives", verdict="error", evidence=f"wrong values: {shorten(wrong)}", remedy=remedy)
    names, sizes = {time.collective for time in times}, {time.bytes for time in times}
    evidence = f"{len(names)} collectives on {device}, right at {len(sizes)} sizes"
    return Finding(name="collectives", verdict="ok", evidence=evidence)


def judge_speeds(speeds: Sequence[DeviceSpeed], hosts: Sequence[str]) -> Finding:
    """All ranks wait for the slowest device, which is often a broken one. Of all ranks, in order."""
    gemm = statistics.median(speed.gemm_tflops for speed in speeds)
    memory = statistics.median(speed.memory_gb_per_s for speed in speeds)
    slow = [
        f"rank {rank} on {host}: {speed.gemm_tflops:.3g} TFLOP/s, {speed.memory_gb_per_s:.3g} GB/s"
        for rank, (speed, host) in enumerate(zip(speeds, hosts, strict=True))
        if speed.gemm_tflops < SLOW * gemm or speed.memory_gb_per_s < SLOW * memory
    ]
    median = f"{gemm:.3g} TFLOP/s ({speeds[0].dtype}), {memory:.3g} GB/s, the median of {len(speeds)}"
    if slow:
        remedy = "leave that node out, or see what else runs there"
        return Finding(name="speed", verdict="warning", evidence=f"{shorten(slow)}; {median}", remedy=remedy)
    return Finding(name="speed", verdict="ok", evidence=median)


def try_waits(world: World) -> Finding:
    """A message that nobody sends. Collective."""
    seconds = wait_ends(world)
    problem = ""
    if seconds is None or seconds > WAIT_S:
        problem = "a wait of 1 s " + ("did not end" if seconds is None else f"took {seconds:.1f} s")
    remedy = "start through mas-hpc launch, whose watchdog ends ranks that hang (distributed.hang_s)"
    return judge(world, "waits", problem=problem, evidence="a wait of 1 s for nobody ended as an error", remedy=remedy)


def try_sharded_step(world: World) -> Finding:
    """A mesh of all ranks, and one step of FSDP2 whose result is known. Collective."""
    layer = nn.Linear(1, WIDTH, bias=False)
    nn.init.ones_(layer.weight)
    strategy = build_strategy(world, DistributedConfig(strategy="fsdp2"))
    trained = strategy.train(layer, {"all": list(layer.parameters())}, _build_sgd)
    trained.zero_grad()
    trained.backward(trained.module(torch.full((1, 1), 1.0 + world.rank % 2, device=world.device)).sum(), is_last=True)
    trained.clip(["all"], float("inf"))
    trained.step()
    expected = 1.0 - sum(1.0 + rank % 2 for rank in range(world.size))
    [(_, weight)] = trained.whole()
    found = sorted(set(weight.flatten().tolist()))
    problem = (
        "" if found == [expected] and weight.numel() == WIDTH else f"{weight.numel()} weights are {found[:3]}, not {expected}"
    )
    remedy = "distributed.strategy=ddp until the collectives are right"
    return judge(world, "FSDP2", problem=problem, evidence=f"mesh of {world.size}, one step, all weights right", remedy=remedy)


def _build_sgd(groups: Iterable[Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for group in groups for parameter in group], lr=1.0)


def try_push(world: World, transport: WeightTransport) -> Finding:
    """Weights from rank 0 to the first rank of another host, or to the last one where there is one host. Collective."""
    receiver = next((rank for rank, host in enumerate(world.hosts) if host != world.hosts[0]), world.size - 1)
    problem = ""
    try:
        sync = open_sync(world, sender=0, receivers=[receiver], timeout_s=PUSH_S, transport=transport)
        if sync and world.is_first:
            weight = torch.arange(PUSHED, dtype=torch.float32)
            sync.send(version=1, source=HeldWeights([("base", "weight", weight)]))
        elif sync:
            sync.receive(_load)
        if sync:
            sync.close()
    except RolloutError as error:
        problem = str(error)
    evidence = (
        f"{4 * PUSHED >> 20} MiB from rank 0 on {world.hosts[0]} to rank {receiver} on {world.hosts[receiver]} arrived whole"
    )
    remedy = "push over another transport (group: gloo), or look at the network between the two"
    return judge(world, f"weights ({transport})", problem=problem, evidence=evidence, remedy=remedy)


def _load(*, version: int, weights: Iterable[NamedTensor] | None = None) -> str:
    """As an engine: take them, and say what they are. Raises RolloutError for other weights than those that were sent."""
    total = Checksum()
    for policy, name, tensor in weights or ():
        total.add(policy, name, tensor)
        if not torch.equal(tensor.cpu(), torch.arange(PUSHED, dtype=torch.float32)):
            raise RolloutError(f"version {version}: {name} has other values than those that were sent")
    return str(total)


def try_leak(world: World) -> Finding:
    """Memory of the device that its allocator does not see. Collective."""
    try:
        lost = measure_leak(world)
    except RuntimeError as error:
        evidence = f"the driver does not say what is free ({str(error).splitlines()[0]}); ZES_ENABLE_SYSMAN=1 may help"
        return Finding(name="leak", verdict="skipped", evidence=evidence)
    if lost is None:
        return Finding(name="leak", verdict="skipped", evidence="no device with memory of its own")
    problem = f"{lost >> 20} MiB lost in all-gathers into fresh memory" if lost > LEAK_BYTES else ""
    remedy = "do not call empty_cache in a loop; another release of torch or of the driver"
    return judge(world, "leak", problem=problem, evidence=f"{lost >> 20} MiB", remedy=remedy)
