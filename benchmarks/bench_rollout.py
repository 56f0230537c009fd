"""Sixteen samples of one 300-token prompt: the native engine against transformers' `generate`, one thread, CPU seconds.

The model has the shape of SmolLM2-135M and random weights: speed does not depend on them. eos is off.
Run: OMP_NUM_THREADS=1 python -m benchmarks.bench_rollout
"""

from __future__ import annotations

import torch
import transformers
from reporting import alternate, cost_row, cpu_seconds, report
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine

NUM_SAMPLES, PROMPT_LENGTH, NEW_TOKENS = 16, 300, 32
PEER = f"transformers {transformers.__version__} generate, batch {NUM_SAMPLES}"


def smollm2_shape() -> LlamaForCausalLM:
    """30 layers of 576, 9 query and 3 key/value heads, tied vocabulary of 49,152; fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Measure, write results/rollout.json, print the table."""
    torch.set_num_threads(1)
    peer = smollm2_shape()
    model = prepare(smollm2_shape())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    engine = NativeEngine(model, tokenizer, max_rows=NUM_SAMPLES)
    prompt = torch.randint(49152, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(1))
    prompt_ids = tuple(prompt.tolist())

    def ours(new_tokens: int) -> float:
        sampling = SamplingParams(max_new_tokens=new_tokens)
        spans = (("", PROMPT_LENGTH),)
        requests = [
            Request(prompt_ids=prompt_ids, prompt_spans=spans, policy="shared", seed=seed, sampling=sampling)
            for seed in range(NUM_SAMPLES)
        ]
        return cpu_seconds(lambda: engine.generate(requests))

    def theirs(new_tokens: int) -> float:
        options = {"max_new_tokens": new_tokens, "do_sample": True, "top_k": 0}
        batch = prompt.repeat(NUM_SAMPLES, 1)
        return cpu_seconds(lambda: peer.generate(batch, attention_mask=torch.ones_like(batch), **options))

    rows = []
    for new_tokens, case, target in (
        (1, "prefill and first token", 13.0), (NEW_TOKENS, f"prefill and {NEW_TOKENS} tokens each", 1.0)
    ):  # fmt: skip
        cost, peer_cost = alternate([lambda n=new_tokens: ours(n), lambda n=new_tokens: theirs(n)])
        case = f"{NUM_SAMPLES} samples of one {PROMPT_LENGTH}-token prompt: {case}"
        rows.append(cost_row(case=case, metric="cpu_s", ours=cost, peer=PEER, theirs=peer_cost, target=target))
    notes = {
        "model": "SmolLM2-135M's shape, random weights, fp32, one thread, both sides sample at temperature 1",
        "target": "prefill: 13; the whole has no promise of its own, its ratio falls with the number of new tokens",
    }
    report("rollout", rows, notes=notes)


if __name__ == "__main__":
    main()
