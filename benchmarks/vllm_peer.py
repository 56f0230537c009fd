"""vLLM's CPU engine as a peer of bench_rollout.py: run with the Python of an environment that has it, and nothing of ours.

A job comes as a line of JSON on stdin, its result goes as one to stdout (vLLM's own log to stderr). The first describes the
engine, which later ones go on with. Float32, one thread, the engine in this process, so that `time.process_time` sees all of
it. Completions have a forced length.

    {"model": "folder", "adapters": {"solver": "folder"}, "max_rows": 64, "prefix_caching": true, "eager": false,
     "cases": [{"name": "groups", "prompts": [[1, 5], [1, 5]], "new_tokens": [40, 12], "adapters": ["solver", null]}],
     "decode": {"batches": [1, 8, 32], "context": 300, "steps": 32}, "prefill": {"prompts": 8, "length": 300}}

Every key may be left out, but `model` in the first; vLLM's CPU build compiles no model with adapters, so these make it eager.
`new_tokens` has one number a prompt; `adapters` of a case, one name or null a prompt. Prefixes are forgotten before a case,
unless its "fresh" is false.
Run: .venv-vllm/bin/python benchmarks/vllm_peer.py < job.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

Record = dict[str, Any]
KV_BYTES = 3 << 30


class Peer:
    """One vLLM engine and the time that each of its steps takes."""

    def __init__(self, job: Record) -> None:
        adapters = job.get("adapters") or {}
        lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": job.get("max_rank", 16)} if adapters else {}
        arguments = EngineArgs(
            model=job["model"], dtype="float32", seed=0, enforce_eager=job.get("eager", bool(adapters)),
            max_num_seqs=job.get("max_rows", 64), enable_prefix_caching=job.get("prefix_caching", True),
            kv_cache_memory_bytes=KV_BYTES, logprobs_mode="processed_logprobs", disable_log_stats=True, **lora,
        )  # fmt: skip
        config = arguments.create_engine_config()
        config.parallel_config.distributed_executor_backend = "uni"
        self.engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self.adapters = {name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), 1)}
        self.count = 0

    def add(self, prompt: list[int], new_tokens: int, adapter: str | None = None) -> None:
        """Queue one completion of exactly `new_tokens`, sampled at temperature 1 with the log-probs of its tokens.

        Without a seed: vLLM's CPU runner fails on a seeded request whose prompt it prefills in two chunks.
        """
        sampling = SamplingParams(
            temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        lora = self.adapters[adapter] if adapter else None
        self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, sampling, lora_request=lora)
        self.count += 1

    def run(self) -> tuple[list[float], Record]:
        """Serve what is queued; return CPU seconds of each step, and the totals."""
        start_s, tokens, steps_s = time.perf_counter(), [], []
        while self.engine.has_unfinished_requests():
            cpu_s = time.process_time()
            ended = self.engine.step()
            steps_s.append(time.process_time() - cpu_s)
            tokens += [len(output.outputs[0].token_ids) for output in ended]
        totals = {
            "cpu_s": sum(steps_s), "wall_s": time.perf_counter() - start_s, "steps": len(steps_s),
            "requests": len(tokens), "decoded_tokens": sum(tokens),
        }  # fmt: skip
        return steps_s, totals

    def forget(self) -> None:
        """Drop cached prefixes."""
        assert self.engine.reset_prefix_cache()

    def case(self, case: Record) -> Record:
        """One workload."""
        if case.get("fresh", True):
            self.forget()
        cpu_s = time.process_time()
        names = case.get("adapters") or [None] * len(case["prompts"])
        for prompt, new_tokens, adapter in zip(case["prompts"], case["new_tokens"], names, strict=True):
            self.add(prompt, new_tokens, adapter)
        _, totals = self.run()
        return {"name": case["name"], **totals, "cpu_s": time.process_time() - cpu_s}

    def decode(self, batch: int, context: int, steps: int) -> Record:
        """CPU seconds of a step that decodes `batch` rows, whose contexts have `context` tokens of their own."""
        self.forget()
        generator = torch.Generator().manual_seed(batch)
        spread = 2 + batch * context // self.engine.vllm_config.scheduler_config.max_num_batched_tokens
        for _ in range(batch):
            self.add(self.random_prompt(context, generator), steps + 2 * spread)
        steps_s, _ = self.run()
        steady = steps_s[-steps - spread : -spread]  # all rows are prefilled, and none has ended
        return {"batch": batch, "cpu_s_per_step": statistics.mean(steady), "steps": steps}

    def prefill(self, prompts: int, length: int) -> Record:
        """Prompt tokens a CPU second: prompts of their own, one new token each."""
        self.forget()
        generator = torch.Generator().manual_seed(length)
        for _ in range(prompts):
            self.add(self.random_prompt(length, generator), 1)
        _, totals = self.run()
        return {"tokens": prompts * length, "cpu_s": totals["cpu_s"], "tokens_per_cpu_s": prompts * length / totals["cpu_s"]}

    def random_prompt(self, length: int, generator: torch.Generator) -> list[int]:
        return torch.randint(self.engine.model_config.get_vocab_size(), (length,), generator=generator).tolist()


def main() -> None:
    """Serve the jobs with the engine that the first describes; answer each by a line."""
    result, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    peer: Peer | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if peer is None:
            peer = Peer(job)
            peer.prefill(1, 32)
        decode, prefill = job.get("decode"), job.get("prefill")
        answer = {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
            "prefill": peer.prefill(**prefill) if prefill else None,
            "decode": [peer.decode(batch, decode["context"], decode["steps"]) for batch in decode["batches"]] if decode else [],
            "cases": [peer.case(case) for case in job.get("cases", [])],
        }
        print(json.dumps(answer), file=result, flush=True)


if __name__ == "__main__":
    main()
