"""One AT-GRPO tree in one pass against the same samples as rows: backbone forward and backward, frozen weights.

The rows are transformers' own sdpa attention at its best: rows of equal length are batched together, so nothing is
padded and no mask is built. Both sides compute the same hidden states at the same trained tokens (checked), no LM head.
Run: OMP_NUM_THREADS=1 python benchmarks/bench_tree.py [--quick]
Legend: N trained tokens, D hidden size, B rows, L row length.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch
from reporting import Row, alternate, cost_row, cpu_seconds, report, table
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mas_hpc.data.token_tree import TokenTree, pack
from mas_hpc.models.attention import hidden_states, prepare
from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.types import Sample

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=48,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
)
SHARE = 0.93
"""Of the ratio of tokens: the least speed-up that is promised for trees that are large enough."""
MAX_ROWS = 64
"""Of a batch: 256 rows of the short trees at once would keep 15 GiB of activations, and take longer."""
PEER = f"transformers {version('transformers')} sdpa, one row a sample"
NOTES = {
    "work": "backbone forward + backward, float32, frozen weights, gradient to the input embeddings; no LM head, no optimizer",
    "weights": "random, in the shapes of SmolLM2-135M (30 layers, hidden 576, 9 query and 3 key/value heads) "
    "or of the tiny model",
    "cpu_s": "process CPU seconds, one thread, median of 3 repeats in alternation (ours, rows, ours, rows, ...)",
    "peak_mib": "a fresh process for each: VmHWM at the end minus VmRSS after the model is loaded; default allocator settings",
    "target": f"{SHARE:.0%} of the ratio of tokens for the trees of SmolLM2-135M, no slower than rows for the others",
    "linear": "on an AMD processor ours multiplies by the weights with oneDNN, as training does (models/linear.py); "
    "elsewhere, and rows always, with what torch calls",
    "rows": "rows of equal length in one batch (of at most 64): no padding, no mask; `one backward` keeps all rows until it, "
    "as a batch does, `a backward each` frees every batch of equal length before the next",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Trees of AT-GRPO: each agent reads the state and a cue, K siblings answer, one is committed."""

    trees: int
    prompt: int
    agents: int
    siblings: int
    completion: int
    cue: int
    config: LlamaConfig

    def samples(self) -> list[Sample]:
        """Random tokens, seed 0."""
        rng = random.Random(0)
        return [sample for number in range(self.trees) for sample in self._tree(f"q{number}", rng)]

    def _tree(self, name: str, rng: random.Random) -> list[Sample]:
        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(self.config.vocab_size) for _ in range(count))

        state, samples = tokens(self.prompt), []
        for _ in range(self.agents):
            state += tokens(self.cue)
            answers = [tokens(self.completion) for _ in range(self.siblings)]
            samples += [
                Sample(id=name, tree=name, agent="", policy="", prompt_ids=state, prompt_spans=(), completion_ids=answer)
                for answer in answers
            ]
            state += rng.choice(answers)
        return samples


WIDE = Shape(trees=1, prompt=300, agents=4, siblings=8, completion=48, cue=16, config=SMOLLM2_135M)
SPINE = Shape(trees=1, prompt=200, agents=4, siblings=4, completion=64, cue=16, config=SMOLLM2_135M)
SHORT = Shape(trees=64, prompt=40, agents=1, siblings=4, completion=12, cue=0, config=SMOLLM2_135M)
FOREST = Shape(trees=64, prompt=8, agents=4, siblings=8, completion=6, cue=2, config=TINY)


CASES = (
    ("SmolLM2-135M tree (prompt 300, 4 agents, K=8, 48 tokens, cue 16)", WIDE, SHARE),
    ("SmolLM2-135M tree (prompt 200, 4 agents, K=4, 64 tokens, cue 16)", SPINE, SHARE),
    ("SmolLM2-135M, 64 trees (prompt 40, K=4, 12 tokens)", SHORT, None),
    ("64 tiny trees (prompt 40, K=4, 12 tokens)", replace(SHORT, config=TINY), None),
    ("64 tiny trees (prompt 8, 4 agents, K=8, 6 tokens, cue 2)", FOREST, None),
)
"""Name, shape, and the promised share of the ratio of tokens; None: no slower than rows."""


def build(config: LlamaConfig, *, tree: bool) -> PreTrainedModel:
    """The same random weights each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(config)).eval().requires_grad_(False)
    model.enable_input_require_grads()
    return prepare(model) if tree else model


def score(hidden_ND: Tensor) -> Tensor:
    """A scalar to differentiate; a plain sum of normalised states would have almost no gradient."""
    return (hidden_ND * torch.linspace(-1, 1, hidden_ND.shape[-1])).sum()


def tree_step(model: PreTrainedModel, samples: list[Sample]) -> float:
    """Ours, planning included."""
    tree: TokenTree = pack(samples, adapters={}, scope="sequence")
    hidden_TD = hidden_states(model, tree.token_T, tree.position_T, TreeAttention(tree.leave_T))
    loss = score(hidden_TD[tree.predictor_N])
    loss.backward()
    return loss.item()


def row_step(model: PreTrainedModel, samples: list[Sample], *, backward_each: bool) -> float:
    """Theirs. As in ours the last token, which predicts nothing, is not run."""
    total = 0.0
    pending: list[Tensor] = []
    for rows in equally_long(samples):
        token_BL = torch.tensor([sample.prompt_ids + sample.completion_ids[:-1] for sample in rows])
        hidden_BLD = model.model(input_ids=token_BL, use_cache=False).last_hidden_state
        loss = score(hidden_BLD[:, len(rows[0].prompt_ids) - 1 :])
        total += loss.item()
        if backward_each:
            loss.backward()
        else:
            pending.append(loss)
    if pending:
        torch.stack(pending).sum().backward()
    return total


def equally_long(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Batches of at most MAX_ROWS rows of one length."""
    for _, group in groupby(sorted(samples, key=length), key=length):
        rows = list(group)
        yield from (rows[first : first + MAX_ROWS] for first in range(0, len(rows), MAX_ROWS))


def length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


STEPS: dict[str, Callable[[PreTrainedModel, list[Sample]], float]] = {
    "tree": tree_step,
    "rows": lambda model, samples: row_step(model, samples, backward_each=False),
    "rows_each": lambda model, samples: row_step(model, samples, backward_each=True),
}


def time_row(name: str, shape: Shape, share: float | None, *, repeats: int) -> Row:
    """CPU seconds of one step."""
    samples = shape.samples()
    models = {"tree": build(shape.config, tree=True), "rows_each": build(shape.config, tree=False)}
    losses = [STEPS[kind](model, samples) for kind, model in models.items()]  # warms up as well
    torch.testing.assert_close(*(torch.tensor(loss) for loss in losses), rtol=1e-3, atol=1e-2)
    work = [lambda kind=kind: cpu_seconds(lambda: STEPS[kind](models[kind], samples)) for kind in models]
    ours, theirs = alternate(work, repeats=repeats)
    tree_tokens = len(pack(samples, adapters={}, scope="sequence"))
    row_tokens = sum(length(sample) - 1 for sample in samples)
    target = 1.0 if share is None else share * row_tokens / tree_tokens
    case = f"{name}: {tree_tokens} tree tokens for {row_tokens} in rows"
    return cost_row(case=case, metric="cpu_s", ours=ours, peer=PEER, theirs=theirs, target=target)


def memory_rows() -> list[Row]:
    """Peak memory of one step over the large tree."""
    peak = {kind: peak_in_fresh_process(kind) for kind in STEPS}
    cases = [("one backward", "rows", 2.0), ("rows: a backward each", "rows_each", 1.0)]
    name, ours = "SmolLM2-135M tree", peak["tree"]
    return [
        cost_row(case=f"{name}, {case}", metric="peak_mib", ours=ours, peer=PEER, theirs=peak[kind], target=target)
        for case, kind, target in cases
    ]


def peak_in_fresh_process(kind: str) -> float:
    command = [sys.executable, __file__, "--peak", kind]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def peak_mib(kind: str) -> float:
    """Peak resident memory of one step above that of the loaded model."""
    model, samples = build(SMOLLM2_135M, tree=kind == "tree"), SPINE.samples()
    loaded_kib = memory_kib("VmRSS")
    STEPS[kind](model, samples)
    return (memory_kib("VmHWM") - loaded_kib) / 1024


def memory_kib(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0])


def main() -> None:
    """Measure everything, or with --peak the memory of one step in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", choices=STEPS)
    parser.add_argument("--quick", action="store_true", help="the tiny model, once: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(json.dumps(peak_mib(arguments.peak)))
    elif arguments.quick:
        tiny = [time_row(name, replace(shape, config=TINY), None, repeats=1) for name, shape, _ in CASES]
        Console().print(table("every shape with the tiny model", tiny))
    else:
        memory = memory_rows()  # first: what timing has freed stays with this process
        report("tree", [*(time_row(name, shape, share, repeats=3) for name, shape, share in CASES), *memory], notes=NOTES)


if __name__ == "__main__":
    main()
