"""All weights of SmolLM2-135M from one rank to another: streamed in blocks with checksums, against tensor by tensor.

End to end: from the trainer's parameters to the engine's parameters, in its own process. Ours includes both checksums, the
meeting in the store and the acknowledgement; the peers only move the bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_tree import SMOLLM2_135M
from reporting import Row, cost_row, report
from torch import Tensor
from transformers import LlamaForCausalLM

from mas_hpc.checksum import checksum
from mas_hpc.distributed.mpi import load_mpi
from mas_hpc.distributed.weight_source import HeldWeights
from mas_hpc.distributed.weight_sync import WeightSync, open_sync
from mas_hpc.distributed.world import World, connected
from mas_hpc.models.weights import assign_weights, named_weights

TARGET_GB_PER_S = 2.5
REPEATS = 9
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "mpiexec": [str(Path(sys.executable).parent / "mpiexec"), "-n", "2", sys.executable],
}
OURS = {
    "torchrun": {"shared": "memory in /dev/shm", "group": "gloo broadcast"},
    "mpiexec": {"shared": "MPI shared window", "mpi": "MPI Ibcast"},
}
PEERS = {"torchrun": "gloo broadcast tensor by tensor", "mpiexec": "MPI Bcast tensor by tensor"}
NOTES = {
    "work": "134.5M float32 parameters in 272 tensors, random, from rank 0's parameters to rank 1's, both on this host",
    "ours": "with checksums on both sides, waiting for each other in the store and the acknowledgement; peers without",
    "gb_per_s": "538 MB over the median wall time of 9 repeats in alternation (ours, peer, ours, ...), from a barrier until "
    "both ranks are done; the first push, which makes the buffers, is not counted. Other load lowers it",
    "cpu_s": "process CPU seconds of both ranks together, median of the same repeats",
    "flat": "one broadcast of a buffer that both sides keep all parameters in: no packing, no checksum; held to half of it",
    "checksum": "XXH3 over the same parameters alone, one rank; ours contains it once on each side",
}


def worker(folder: Path) -> None:
    """One of the two ranks: measure every way in turn; rank 0 writes the medians."""
    with connected(World.from_env()) as world:
        torch.manual_seed(world.rank)
        with torch.device("meta"):
            model = LlamaForCausalLM(SMOLLM2_135M)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        syncs = {way: open_sync(world, sender=0, receivers=[1], timeout_s=120, transport=way) for way in OURS[_launcher(world)]}
        ways: dict[str, Callable[[], None]] = {
            **{way: lambda sync=sync: push(sync, world, model) for way, sync in syncs.items()},
            "peer": lambda: tensor_by_tensor(world, model.parameters()),
            "flat": lambda: move(world, flat),
            "checksum": lambda: touch(checksum(named_weights(model, None, ["base"])) if world.is_first else ""),
        }
        for work in ways.values():
            work()
        rounds = [{way: measure(work) for way, work in ways.items()} for _ in range(REPEATS)]
        if world.is_first:
            medians = {way: [statistics.median(found[way][part] for found in rounds) for part in (0, 1)] for way in ways}
            medians["bytes"] = [flat.nbytes, flat.nbytes]
            (folder / "medians.json").write_text(json.dumps(medians))
        for sync in syncs.values():
            sync.close()


def _launcher(world: World) -> str:
    return "mpiexec" if world.launcher == "mpi" else "torchrun"


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds until both ranks are done, and CPU seconds of both."""
    dist.barrier()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    spent = torch.tensor([time.perf_counter() - wall_s, time.process_time() - cpu_s], dtype=torch.float64)
    both = [torch.zeros_like(spent) for _ in range(2)]
    dist.all_gather(both, spent)
    return max(float(one[0]) for one in both), sum(float(one[1]) for one in both)


def push(sync: WeightSync, world: World, model: LlamaForCausalLM) -> None:
    if world.is_first:
        sync.send(version=1, source=HeldWeights(named_weights(model, None, ["base"])))
    else:
        sync.receive(lambda *, version, weights=None: assign_weights(model, None, weights))


def tensor_by_tensor(world: World, parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        move(world, parameter.detach())


def move(world: World, tensor: Tensor) -> None:
    if world.launcher == "mpi":
        load_mpi().COMM_WORLD.Bcast(tensor.numpy(), root=0)
    else:
        dist.broadcast(tensor, 0)


def touch(text: str) -> None:
    """For work whose result nobody needs."""


def rows_of(launcher: str, found: dict[str, Any]) -> list[Row]:
    size_gb = found["bytes"][0] / 1e9
    rates = {way: size_gb / wall_s for way, (wall_s, _) in found.items() if way != "bytes"}
    rows = []
    for way, what in OURS[launcher].items():
        case = f"{launcher}, {what}"
        others = [
            (PEERS[launcher], rates["peer"], 1.0),
            ("one flat buffer, kept", rates["flat"], 0.5),
            ("required", TARGET_GB_PER_S, 1.0),
        ]
        rows += [
            Row(case=case, metric="gb_per_s", ours=rates[way], peer=peer, theirs=rate, ratio=rates[way] / rate, target=target)
            for peer, rate, target in others
        ]
        rows.append(
            cost_row(case=case, metric="cpu_s", ours=found[way][1], peer=PEERS[launcher], theirs=found["peer"][1], target=1.0)
        )
    checked = rates["checksum"]
    rows.append(
        Row(
            case=f"{launcher}, checksum alone", metric="gb_per_s", ours=checked, peer="required", theirs=TARGET_GB_PER_S,
            ratio=checked / TARGET_GB_PER_S, target=4.0,
        )
    )  # fmt: skip
    return rows


def main() -> None:
    """Start the two ranks under each launcher; with --worker, be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        worker(arguments.worker)
        return
    rows = []
    for launcher, command in LAUNCHERS.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, __file__, "--worker", folder], check=True)
            rows += rows_of(launcher, json.loads((Path(folder) / "medians.json").read_text()))
    print(report("weight_sync", rows, notes=NOTES).name)


if __name__ == "__main__":
    main()
