"""mas-hpc calibrate: what the ranks of this machine do when all are at work, written down for mas-hpc scale."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median, pstdev

import torch
from rich.console import Console
from rich.table import Table

from mas_hpc.config import ModelConfig
from mas_hpc.config_methods import SFTConfig
from mas_hpc.distributed import probe, supervisor
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.device import Wanted
from mas_hpc.distributed.exchange import gather_values
from mas_hpc.distributed.world import World, connected
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.models.load import load_model
from mas_hpc.scaling.calibration import Calibration, Line, fit_line
from mas_hpc.scaling.compute import Trained, training_flops
from mas_hpc.scaling.load import Pass
from mas_hpc.scaling.network import Collective
from mas_hpc.scaling.shape import DTYPE_BYTES, ModelShape, shape_of
from mas_hpc.scaling.training import OPTIMIZER_PASSES
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import offline_objective
from mas_hpc.training.network import Network
from mas_hpc.training.share import Totals
from mas_hpc.training.timing import StepTimer
from mas_hpc.types import Sample

MEASURED: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
SIZES_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 26)
REPEATS = 5
LENGTH = 256


def start(output: Path, ranks: int, device: Wanted) -> int:
    """Start so many ranks on this host, which measure; the exit code. Raises LaunchError under a launcher."""
    if World.from_env().size > 1:
        raise LaunchError(f"calibrate -n {ranks}: a launcher has started the ranks already; leave -n out")
    command = (sys.executable, "-m", "mas_hpc", "calibrate", "-o", str(output), "--device", device)
    return supervisor.launch(supervisor.Launch(job="calibrate", command=command, ranks=ranks, max_restarts=0))


def calibrate(output: Path, device: Wanted) -> int:
    """Measure on all ranks of this world, and write the file on the first; 0. Raises ConfigError where it cannot be written."""
    if not output.parent.is_dir():
        raise ConfigError(f"-o {output}: {output.parent} is no folder; make it, or name another")
    with connected(World.from_env(), device) as world:
        found = measure(world)
        if world.is_first:
            output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
            _print(Console(), found, output)
    return 0


def measure(world: World) -> Calibration:
    """All of it, the same on every rank. Collective."""
    collectives = probe.measure_collectives(world, SIZES_BYTES, REPEATS, collectives=MEASURED)
    wrong = [f"{one.collective} of {one.bytes} bytes" for one in collectives if not one.correct]
    if wrong:
        raise LaunchError(f"calibrate: wrong results of {', '.join(wrong)}; see mas-hpc doctor --mpi")
    lines: list[Line] = []
    for name in MEASURED if collectives else ():
        of_it = [one for one in collectives if one.collective == name]
        lines.append(fit_line(name, [one.bytes for one in of_it], [one.seconds for one in of_it]))
    speed = probe.measure_device(world)
    passes, optimizer = measure_training(world)
    slowest = {name: _slowest(world, values) for name, values in {"pass": passes, "optimizer": optimizer}.items()}
    shape, work, trained = _probe_work(world)
    size = DTYPE_BYTES[_model(world).dtype]
    return Calibration(
        host=platform.node() if world.size == 1 else ", ".join(sorted(set(world.hosts))[:4]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"), device=world.device.type, ranks=world.size,
        versions={"python": platform.python_version(), "torch": version("torch"), "mas-hpc": version("mas-hpc")},
        gemm_tflops=speed.gemm_tflops, memory_gb_per_s=speed.memory_gb_per_s,
        pass_tflops=training_flops(shape, work, trained) / median(slowest["pass"]) / 1e12,
        optimizer_gb_per_s=OPTIMIZER_PASSES["adamw"] * size * trained.parameters / median(slowest["optimizer"]) / 1e9,
        collectives=tuple(lines), spread=pstdev(math.log(seconds) for seconds in slowest["pass"]),
    )  # fmt: skip


def measure_training(world: World) -> tuple[list[float], list[float]]:
    """Seconds of forward and backward passes, and of optimizer steps, of a model of this rank alone, as all others have one."""
    model, _ = load_model(_model(world), seed=0, device=world.device)
    timer = StepTimer(synchronize=lambda: probe.synchronize(world.device))
    method = SFTConfig(steps=1000, learning_rate=1e-5)
    learner = Learner(Network(model=model), DataParallel(World(device=world.device)), method, timer=timer)
    samples, passes, optimizer = chains(_rows(world), LENGTH), [], []
    for _ in range(REPEATS + 1):
        probe.meet(world)
        timer.start()
        learner.update(samples, offline_objective(method), Totals.of(samples))
        seconds = timer.lap()
        passes.append(seconds["time/forward"] + seconds["time/backward"])
        optimizer.append(seconds["time/optimizer"])
    return passes[1:], optimizer[1:]  # the first one makes the optimizer's states


def chains(rows: int, length: int, vocabulary: int = 26) -> list[Sample]:
    """Rows of random tokens, all of one length, of which an eighth is a prompt."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()
    prompt = length // 8
    return [
        Sample(
            id=str(number), tree=str(number), agent="a", policy="a", prompt_ids=tuple(row[:prompt]),
            prompt_spans=(("", prompt),), completion_ids=tuple(row[prompt:]),
        )
        for number, row in enumerate(drawn)
    ]  # fmt: skip


def chain_work(rows: int, length: int) -> Pass:
    """What such rows are to the model."""
    return Pass(tokens=rows * length, predictors=rows * (length - length // 8), pairs=rows * length**2 / 2, rows=rows * length)


def _model(world: World) -> ModelConfig:
    if world.device.type == "cpu":
        return ModelConfig(hidden_size=384, num_layers=4, num_heads=6)
    return ModelConfig(hidden_size=2048, num_layers=8, num_heads=16, dtype="bfloat16")


def _rows(world: World) -> int:
    return 4 if world.device.type == "cpu" else 32


def _probe_work(world: World) -> tuple[ModelShape, Pass, Trained]:
    shape = shape_of(_model(world))
    trained = Trained(body=shape.body, head=shape.head, parameters=shape.parameters, checkpointing=False)
    return shape, chain_work(_rows(world), LENGTH), trained


def _slowest(world: World, seconds: Sequence[float]) -> list[float]:
    """Of all ranks, repeat by repeat."""
    everywhere = gather_values(world, {"seconds": list(seconds)})
    return [max(values) for values in zip(*(one["seconds"] for one in everywhere), strict=True)]


def _print(console: Console, found: Calibration, output: Path) -> None:
    console.print(
        f"{found.ranks} ranks on {found.device}: products {found.gemm_tflops:.3g} TFLOP/s, training passes "
        f"{found.pass_tflops:.3g} TFLOP/s, memory {found.memory_gb_per_s:.3g} GB/s, optimizer "
        f"{found.optimizer_gb_per_s:.3g} GB/s a rank", highlight=False,
    )  # fmt: skip
    table = Table("collective", "latency (us)", "GB/s", "residual")
    for line in found.collectives:
        rate = f"{1e-9 / line.s_per_byte:.3g}" if line.s_per_byte else "-"
        table.add_row(line.collective, f"{1e6 * line.latency_s:.3g}", rate, f"{line.residual:.0%}")
    if found.collectives:
        console.print(table)
    console.print(f"written: {output}", highlight=False)
