"""What a checkpoint costs: how long training waits for one, and how fast it is written and read, beside torch's own.

Run: OMP_NUM_THREADS=1 python benchmarks/bench_checkpoint.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from reporting import Row, alternate, cost_row, report

from mas_hpc.config import ModelConfig
from mas_hpc.config_distributed import CheckpointConfig
from mas_hpc.config_methods import SFTConfig
from mas_hpc.distributed.checkpoint_files import Position
from mas_hpc.distributed.checkpoints import Checkpoints, State
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.models.load import load_model
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import offline_objective
from mas_hpc.training.network import Network
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample

CHAINS, LENGTH = 4, 256
STEPS_A_CHECKPOINT = 2
PEER = "torch.distributed.checkpoint"
NOTES = {
    "work": f"SmolLM2-135M in float32 with AdamW's states, one rank; a step of SFT on {CHAINS} chains of {LENGTH} tokens",
    "blocking": "wall seconds that a save keeps training waiting: copying the state, while nothing is being written; the peer "
    "is a step, held to ten times it",
    "loop": f"wall seconds of {STEPS_A_CHECKPOINT} steps with a checkpoint before them, whose writer runs beside them on the "
    "same cores; the peer is these steps without; a tenth of a step may be lost",
    "save": "GB/s of a save that training waits for, forced to disk by both, and of deleting the one before, after it; ours "
    "copies the state first and reads back what was written for its checksum",
    "load": "GB/s from the same files, which the system still has in memory, into the state; ours reads them twice, first for "
    "the checksums",
    "repeats": "medians of 3 in alternation; other load on the machine lowers all",
}


def samples(vocabulary: int, quick: bool) -> list[Sample]:
    """Chains of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (CHAINS, 32 if quick else LENGTH), generator=generator).tolist()
    return [
        Sample(
            id=str(number), tree=str(number), agent="a", policy="a", prompt_ids=tuple(row[:8]), prompt_spans=(("", 8),),
            completion_ids=tuple(row[8:]),
        )
        for number, row in enumerate(rows)
    ]  # fmt: skip


def wall(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """A learner that has taken a step, and where its checkpoints go."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder = folder
        model, _ = load_model(ModelConfig() if quick else ModelConfig(path="smollm2"), seed=0)
        method = SFTConfig(steps=1000, learning_rate=1e-5)
        self.learner = Learner(Network(model=model), DataParallel(World()), method)
        batch = samples(model.config.vocab_size, quick)
        self.step = partial(self.learner.update, batch, offline_objective(method), Totals.of(batch))
        self.step()
        self.num_saved, self.peer = 0, folder / "peer"
        self.stores = {kind: self._store(kind, asynchronous=kind == "asynchronous") for kind in ("asynchronous", "waiting")}

    def _store(self, kind: str, *, asynchronous: bool) -> Checkpoints:
        return Checkpoints(World(), self.folder / kind, CheckpointConfig(keep_last=1, asynchronous=asynchronous))

    def state(self) -> dict[str, Tensor]:
        """What both save."""
        return dict(self.learner.state().tensors)

    def save(self, kind: str) -> None:
        """One of our checkpoints."""
        self.num_saved += 1
        self.stores[kind].save(Position(phase="train", step=self.num_saved), {"policy": State(tensors=self.state())})

    def load(self) -> None:
        """The last checkpoint that training waited for, checked as a run that goes on does."""
        store = self.stores["waiting"]
        position = store.find(None, print)
        assert position
        store.open(position).under("policy").fill(self.state())

    def blocking(self) -> float:
        """Seconds that a save blocks, its writer idle before."""
        self.stores["asynchronous"].wait()
        return wall(lambda: self.save("asynchronous"))

    def loop(self, *, saves: bool) -> float:
        """Seconds of the steps between two checkpoints, with one before them or without."""
        self.stores["asynchronous"].wait()

        def steps() -> None:
            if saves:
                self.save("asynchronous")
            for _ in range(STEPS_A_CHECKPOINT):
                self.step()

        return wall(steps)

    def peer_save(self) -> None:
        """torch's checkpoint, forced to disk as well; the one before is deleted after it, as ours is."""
        before, self.peer = self.peer, self.folder / f"peer_{self.num_saved}"
        dcp.save(self.state(), checkpoint_id=self.peer, no_dist=True)
        shutil.rmtree(before, ignore_errors=True)

    def peer_load(self) -> None:
        """From the files of peer_save."""
        dcp.load(self.state(), checkpoint_id=self.peer, no_dist=True)


def measure(bench: Bench, repeats: int) -> list[Row]:
    """All rows; the first saves, which find memory for the copy and for the files, are not counted."""
    for kind in ("asynchronous", "waiting", "waiting"):
        bench.save(kind)
        bench.peer_save()
    step_s, blocking_s = alternate([lambda: wall(bench.step), bench.blocking], repeats=repeats)
    without_s, with_s = alternate([lambda: bench.loop(saves=False), lambda: bench.loop(saves=True)], repeats=repeats)
    bench.stores["asynchronous"].close()
    gigabytes = sum(tensor.nbytes for tensor in bench.state().values()) / 1e9
    save_s = alternate([lambda: wall(lambda: bench.save("waiting")), lambda: wall(bench.peer_save)], repeats=repeats)
    load_s = alternate([lambda: wall(bench.load), lambda: wall(bench.peer_load)], repeats=repeats)
    rows = [
        cost_row(
            case="asynchronous save: blocking", metric="wall_s", ours=blocking_s, peer="a step", theirs=step_s, target=10.0
        ),
        cost_row(
            case="asynchronous save: in the loop",
            metric="wall_s",
            ours=with_s,
            peer="the same steps",
            theirs=without_s,
            target=STEPS_A_CHECKPOINT / (STEPS_A_CHECKPOINT + 0.1),
        ),
    ]
    for case, (ours_s, theirs_s), target in (("save", save_s, 0.8), ("load", load_s, 0.5)):
        rows.append(
            Row(
                case=f"{case}, {gigabytes:.2f} GB", metric="gb_per_s", ours=gigabytes / ours_s, peer=PEER,
                theirs=gigabytes / theirs_s, ratio=theirs_s / ours_s, target=target,
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the tiny model, once: to see that it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Bench(Path(folder), quick=quick), 1 if quick else 3)
    report("checkpoint-quick" if quick else "checkpoint", rows, notes=NOTES)


if __name__ == "__main__":
    main()
