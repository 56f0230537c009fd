"""Where a step's time goes, on this rank: seconds of wall by part; memory at its highest, tokens a second, model FLOP use."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from mas_hpc.training.flops import peak_flops

Given = TypeVar("Given")
Result = TypeVar("Result")

PARTS = (
    "rollout", "reward", "forward", "backward", "communication", "optimizer", "sync", "checkpoint", "evaluation",
)  # fmt: skip
"""reward: also credit, and what it asks of reference and critic; communication: the gradients' sum over ranks, with clipping;
sync: giving new weights to the engine. What is in none of them is called other."""
OTHER = "other"
NOT_TRAINING = ("rollout", "reward", "sync", "checkpoint", "evaluation")
"""Parts that model FLOP use leaves out."""


class StepTimer:
    """A stopwatch that always runs for one part; a part inside another stops the outer one, so the parts sum to the step.

    On a device that works asynchronously a part lasts until its calls return, not until they are computed, unless `synchronize`
    waits for it. Not for several threads.
    Example: with timer.part("forward"): model(tree)
    """

    def __init__(
        self, *, ranks: int = 1, peak: Callable[[], float | None] = lambda: None,
        synchronize: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """`peak` gives FLOP/s that one of the `ranks` could do at most, None if unknown; the first start asks it, once."""
        self._ranks, self._find_peak, self._synchronize, self._clock = ranks, peak, synchronize, clock
        self._peak: float | None = None
        self._was_started = False
        self._open: list[str] = []
        self._mark = 0.0
        self._forget()

    def start(self) -> None:
        """The first step begins: what was measured before does not count."""
        if not self._was_started:
            self._peak, self._was_started = self._find_peak(), True
        self._forget()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the time of the block, but for parts inside it, to one of PARTS."""
        assert name in PARTS, name
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._synchronize()
            self._charge()
            self._open.pop()

    def timed(self, name: str, call: Callable[[Given], Result]) -> Callable[[Given], Result]:
        """The same call, as a part."""

        def inside(given: Given) -> Result:
            with self.part(name):
                return call(given)

        return inside

    def collect(self, metrics: dict[str, float]) -> None:
        """Move what an update measured, over all ranks, out of its metrics: flops and memory/<name>/max. Tokens are counted."""
        self._flops += metrics.pop("flops", 0.0)
        self._tokens += metrics["tokens"]
        for name in [name for name in metrics if name.startswith("memory/")]:
            self._memory[name] = max(self._memory.get(name, 0.0), metrics.pop(name))

    def lap(self) -> dict[str, float]:
        """End a step and begin the next: time/<part> and time/step in seconds, memory/<name>/max in MiB, tokens_per_s and mfu.

        tokens_per_s: trained tokens of all ranks, as often as they were trained on, over the step. mfu: FLOPs of the model (see
        ModelCost) over what the ranks' peaks allow in the step but for NOT_TRAINING; absent where the peak is unknown.
        """
        assert not self._open, self._open
        self._charge()
        step_s = self._mark - self._began
        found = {f"time/{name}": seconds for name, seconds in self._seconds.items() if seconds}
        found |= {"time/step": step_s, **self._memory}
        if self._tokens:
            found["tokens_per_s"] = self._tokens / step_s
        if self._flops and self._peak:
            training_s = step_s - sum(self._seconds[name] for name in NOT_TRAINING)
            found["mfu"] = self._flops / (training_s * self._peak * self._ranks)
        self._forget()
        return found

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1] if self._open else OTHER] += now - self._mark
        self._mark = now

    def _forget(self) -> None:
        self._seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        self._memory: dict[str, float] = {}
        self._flops = self._tokens = 0.0
        self._began = self._mark = self._clock()


def build_timer(
    model: PreTrainedModel | None, *, device: torch.device, ranks: int, synchronizes: bool
) -> StepTimer:  # fmt: skip
    """The timer of a run that trains this model on the device; `synchronizes` waits for that at the end of every part."""
    if model is None:
        return StepTimer()
    dtype = model.dtype
    waits = synchronizes and device.type != "cpu"
    return StepTimer(
        ranks=ranks, peak=lambda: peak_flops(device, dtype),
        synchronize=torch.get_device_module(device).synchronize if waits else lambda: None,
    )  # fmt: skip


def memory_peaks(device: torch.device) -> dict[str, float]:
    """memory/<name>/max in MiB, since this process began: of the process in the host's memory and of torch on its device."""
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1.0  # ru_maxrss is in bytes there
    found = {"memory/rss_mib/max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit / 1024}
    if device.type != "cpu":
        module = torch.get_device_module(device)
        found["memory/device_mib/max"] = module.max_memory_allocated(device) / 2**20
    return found
