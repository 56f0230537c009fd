"""SFT, DPO and GRPO beside TRL on SmolLM2-135M: same weights, data, order, optimizer and CPU, one thread, float32.

Every measurement is a fresh process; ours and TRL's alternate. Finished ones are kept in --folder, by commit, and not
run again. Usage: OMP_NUM_THREADS=1 python benchmarks/bench_train.py [--case sft] [--data train.jsonl]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import PACKAGES, ROOT, Row, commit, cost_row, report, versions
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mas_hpc.models.smollm2 import converted_folder

Record = dict[str, Any]
CASES = {
    "sft": ("SFT, 8 GSM8K documents, chat template, loss on the answer", 1.8),
    "dpo": ("DPO, 4 pairs, prompt 200, two completions of 64, reference model in the step", 2.0),
    "grpo": ("GRPO, whole step, 4 prompts of 200, G=8, completions of 64", 3.0),
}
"""What each is, and the least ratio that was promised."""
WARMUP_STEPS = {"sft": 1, "dpo": 1, "grpo": 0}
PACKED = "sft-packed"
"""TRL's padding-free SFT, once beside the padded one: a peer of its own."""
LEARNING_RATE = 1e-5
FIRST_LOSS, LATER_LOSS = 1e-4, 1e-3
"""Relative differences of the losses that are still agreement: before and after an update."""
NOTES = {
    "cpu_s": "process CPU seconds of one optimizer step, data loading, tokens' packing and logging included; median of the "
    "repeats; SFT and DPO after one warm-up step, GRPO is the first step of its process",
    "tokens_per_cpu_s": "prompt and completion tokens of the batch, padding not counted, a CPU second",
    "peak_mib": "ru_maxrss of the whole process: libraries, weights, optimizer and activations",
    "loss": "ratio = 1 - relative difference; DPO's first loss is log 2 by construction, its second one follows an update",
    "trl": "defaults but: gradient_checkpointing=False (default True would be slower), bf16=False, use_cpu, no files, constant "
    "rate, no weight decay; on a CPU its fused head scores every position, padding and prompt included",
    "trl grpo": "transformers generation (use_vllm=False) of all 32 rows at once; 4 micro-batches of 8 rows in the update: "
    "32 at once would keep four times the activations; eos suppressed by min_new_tokens, ours is given no stop token",
    "optimizer": "both AdamW, fused, rate 1e-5, betas 0.9 and 0.999, gradient norm 1",
}


def main() -> None:
    """Measure the cases and write benchmarks/results/train.json, or with --side one measurement to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-train")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "trl", PACKED), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"--data {arguments.data}: no such file; expected GSM8K's train.jsonl (question, answer a line)")
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    if arguments.side:
        child(arguments.case[0], arguments.side, arguments.data, arguments.out)
        return
    folder = arguments.folder / (commit() or "no-commit")
    rows = [row for case in arguments.case for row in compare(case, measured(case, arguments.data, folder, arguments.repeats))]
    notes = NOTES | {"trl version": versions((*PACKAGES, "trl"))["trl"], "repeats": str(arguments.repeats)}
    report("train" if len(arguments.case) == len(CASES) else f"train-{'-'.join(arguments.case)}", rows, notes=notes)


def measured(case: str, data: Path, folder: Path, repeats: int) -> dict[str, list[Record]]:
    """All measurements of a case, in turn, each in its own process."""
    sides = ("ours", "trl", PACKED) if case == "sft" else ("ours", "trl")
    found: dict[str, list[Record]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides:
            found[side].append(one(case, side, data, folder / f"{case}-{side}-{repeat}.json"))
    return found


def one(case: str, side: str, data: Path, out: Path) -> Record:
    """A measurement from `out`, made there if it is absent."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--case", case, "--side", side, "--data", str(data), "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with out.with_suffix(".log").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{case}, {side}: the measurement failed; its output is in {out.with_suffix('.log')}")
    record: Record = json.loads(out.read_text())
    print(f"{case:5} {side:10} {out.stem[-1]}: {step_cpu_s(record):7.2f} CPU s, {record['peak_mib']:6.0f} MiB", flush=True)
    return record


def child(case: str, side: str, data: Path, out: Path) -> None:
    """One measurement in this process, written to `out` in one step."""
    torch.set_num_threads(1)
    folder = str(converted_folder())
    load = workload(case, AutoTokenizer.from_pretrained(folder), data)
    if side == "ours":
        import train_ours

        record = train_ours.measure(case, load, folder)
    else:
        import train_peers

        with tempfile.TemporaryDirectory() as scratch:
            record = train_peers.measure(case if side == "trl" else side, load, folder, scratch)
    record |= {
        "case": case, "side": side, "warmup_steps": WARMUP_STEPS[case], "tokens": load["tokens"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.rename(out)


def workload(case: str, tokenizer: PreTrainedTokenizerBase, data: Path) -> Record:
    """What both sides get: texts, sizes and the rate; `tokens` is what each step trains on or reads, without padding."""
    num_steps = WARMUP_STEPS[case] + 1
    common = {"num_steps": num_steps, "learning_rate": LEARNING_RATE}
    if case == "sft":
        rows = conversations(data, 8 * num_steps)
        lengths = [
            len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]) for row in rows
        ]
        return common | {"batch": 8, "conversations": rows, "tokens": [sum(lengths[i : i + 8]) for i in range(0, len(rows), 8)]}
    texts = Texts(tokenizer)
    if case == "dpo":
        pairs = [{"prompt": texts(200), "chosen": texts(63), "rejected": texts(63)} for _ in range(4)]  # eos is the 64th
        return common | {"batch": 4, "beta": 0.1, "pairs": pairs * num_steps, "tokens": [4 * 2 * 264] * num_steps}
    prompts = [texts(200) for _ in range(4)]
    sizes = {"group": 8, "completion": 64, "micro_batches": 4, "tokens": [4 * 8 * 264] * num_steps}
    return common | {"prompts": prompts, "reward": share_of_e} | sizes


def share_of_e(completions: list[str], **_: Any) -> list[float]:
    """The reward, in TRL's form: the share of the letter e."""
    return [completion.count("e") / max(len(completion), 1) for completion in completions]


def conversations(data: Path, count: int) -> list[Record]:
    """The first documents of GSM8K in TRL's conversational prompt and completion."""
    with data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


class Texts:
    """Random texts of exactly so many tokens: words that are one token each, with the blank before them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._random = tokenizer, random.Random(0)
        tokens = (tokenizer.decode([index]) for index in range(len(tokenizer)))
        self._words = [word for word in tokens if word[:1] == " " and word[1:].isalpha() and word.isascii() and word.islower()]

    def __call__(self, count: int) -> str:
        text = "".join(self._random.choices(self._words, k=count))
        assert len(self._tokenizer(text)["input_ids"]) == count
        return text


def step_cpu_s(record: Record) -> float:
    """Mean over the steps after warm-up."""
    return statistics.mean(record["cpu_s"][record["warmup_steps"] :])


def compare(case: str, found: dict[str, list[Record]]) -> list[Row]:
    """Rows of one case: time, rate and memory as medians, and whether both sides did the same."""
    name, target = CASES[case]
    ours, rows = found["ours"], []
    for side, theirs in list(found.items())[1:]:
        peer = f"trl {versions(('trl',))['trl']} {case.upper()}Trainer{', padding-free' if side == PACKED else ''}"
        goal = target if side == "trl" else 1.0
        times = {"ours": median(step_cpu_s(record) for record in ours), "theirs": median(map(step_cpu_s, theirs))}
        tokens = statistics.mean(ours[0]["tokens"][ours[0]["warmup_steps"] :])
        rates = {key: tokens / seconds for key, seconds in times.items()}
        peaks = {"ours": median(record["peak_mib"] for record in ours), "theirs": median(r["peak_mib"] for r in theirs)}
        rows += [
            cost_row(case=name, metric="cpu_s", peer=peer, target=goal, **times),
            Row(case=name, metric="tokens_per_cpu_s", peer=peer, target=goal, ratio=times["theirs"] / times["ours"], **rates),
            cost_row(case=name, metric="peak_mib", peer=peer, target=1.0, **peaks),
            *(same_tokens(name, peer, ours[0], theirs[0]) if case == "grpo" else same_loss(name, peer, ours[0], theirs[0])),
        ]
    return rows


def median(values: Any) -> float:
    return float(statistics.median(values))


def same_loss(name: str, peer: str, ours: Record, theirs: Record) -> list[Row]:
    """The loss of every step of the first repeat."""
    rows = []
    for step, (mine, other) in enumerate(zip(ours["losses"], theirs["losses"], strict=True), start=1):
        agreement = 1 - abs(mine - other) / abs(other)
        target = 1 - (FIRST_LOSS if step == 1 else LATER_LOSS)
        rows.append(
            Row(case=name, metric=f"loss, step {step}", ours=mine, peer=peer, theirs=other, ratio=agreement, target=target)
        )
    return rows


def same_tokens(name: str, peer: str, ours: Record, theirs: Record) -> list[Row]:
    """Samples differ, so what can be compared is how many tokens were trained on."""
    counts = ours["first"]["tokens"], 32 * theirs["first"]["completions/mean_length"]
    same = float(counts[0] == counts[1])
    return [Row(case=name, metric="trained tokens", ours=counts[0], peer=peer, theirs=counts[1], ratio=same, target=1.0)]


if __name__ == "__main__":
    main()
