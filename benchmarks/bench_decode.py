"""A decoding step on one core: the native engine, transformers' `generate`, vLLM's CPU build compiled, and the roofline.

SmolLM2-135M-Instruct in float32, one thread a process, CPU seconds. Decoding reads memory all the time: other work on the
machine, also on other cores, slows it. vLLM runs in an environment of its own (`make test-vllm` makes it).
Six samples of each took 18 minutes.
Run: OMP_NUM_THREADS=1 python benchmarks/bench_decode.py [--quick] [--repeats N]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from reporting import Row, cost_row, report
from rollout_peers import VLLM, VLLM_PYTHON, decode_ours, decode_theirs, hardware, saved

from mas_hpc.config import ModelConfig
from mas_hpc.models.load import load_model
from mas_hpc.rollout.native.engine import NativeEngine

HF = f"transformers {transformers.__version__} generate"
BATCHES = (8, 32)


Measure = Callable[[int, int, int], float]  # batch, context, steps -> CPU seconds of a step


def measure(sides: Mapping[str, Measure], repeats: int, context: int, steps: int) -> dict[tuple[str, int], float]:
    """CPU seconds of a step by engine and batch: medians of samples, each the mean of `steps` steps.

    All engines take one sample in turn, seconds apart, so that what others do to the memory hits all alike.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(repeats + 1):  # the first sample warms up
        for batch in BATCHES:
            for who, cost in sides.items():
                value = cost(batch, context, steps)
                if number:
                    found.setdefault((who, batch), []).append(value)
    for (who, batch), values in found.items():
        print(f"{who}, batch {batch}: {' '.join(f'{value:.4f}' for value in values)}", flush=True)
    return {key: median(values) for key, values in found.items()}


@contextmanager
def sides_of(model: Any, tokenizer: Any, scratch: Path) -> Iterator[dict[str, Measure]]:
    """The engines, by name; vLLM where it is installed."""
    folder, peer = saved(model, tokenizer, scratch)
    engine = NativeEngine(model, tokenizer, max_rows=64)
    sides: dict[str, Measure] = {"ours": partial(decode_ours, engine), HF: partial(decode_theirs, peer)}
    if not VLLM_PYTHON.exists():
        yield sides
        return
    with VLLM() as vllm:
        answer = vllm.ask({"model": str(folder), "eager": False})

        def decode_vllm(batch: int, context: int, steps: int) -> float:
            found = vllm.ask({"decode": {"batches": [batch], "context": context, "steps": steps}})
            return float(found["decode"][0]["cpu_s_per_step"])

        yield sides | {f"vllm {answer['versions']['vllm']} compiled": decode_vllm}


def rows_of(costs: Mapping[tuple[str, int], float], parameters: int, context: int) -> list[Row]:
    """Ours beside each peer, and beside what the core could do at best: reading all weights and caches, or multiplying."""
    read, flops = hardware()
    rows = []
    for (who, batch), cost in sorted(costs.items(), key=lambda item: item[0][1]):
        if who != "ours":
            case = f"decode, batch {batch}, contexts of {context}"
            ours = costs["ours", batch]
            rows.append(cost_row(case=case, metric="cpu_s/step", ours=ours, peer=who, theirs=cost, target=0.9))
    for batch in BATCHES:
        cache = batch * context * 30 * 2 * 3 * 64 * 4
        bound = max((4 * parameters + cache) / read, 2 * parameters * batch / flops)
        name, case = f"roofline: {read / 1e9:.1f} GB/s, {flops / 1e9:.0f} GFLOP/s", f"decode, batch {batch}"
        rows.append(cost_row(case=case, metric="cpu_s/step", ours=costs["ours", batch], peer=name, theirs=bound, target=0.0))
    return rows


def main() -> None:
    """Measure, write results/decode.json, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few steps, once: to see that it runs")
    parser.add_argument("--repeats", type=int, default=7, help="samples of each, in turn, after one that warms up; medians")
    words = parser.parse_args()
    quick = words.quick
    torch.set_num_threads(1)
    repeats, context, steps = (1, 60, 4) if quick else (words.repeats, 300, 32)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model, tokenizer = load_model(ModelConfig(path="smollm2"), seed=0)
        with sides_of(model, tokenizer, Path(scratch)) as sides:
            costs = measure(sides, repeats, context, steps)
    rows = rows_of(costs, sum(parameter.numel() for parameter in model.parameters()), context)
    notes = {
        "model": "SmolLM2-135M-Instruct, float32, one thread, temperature 1, end of sequence off",
        "vllm": "its own process, compiled",
        "samples": f"{repeats} of each, in turn, each the mean of {steps} steps; medians",
    }
    report("decode-quick" if quick else "decode", rows, notes=notes)


if __name__ == "__main__":
    main()
