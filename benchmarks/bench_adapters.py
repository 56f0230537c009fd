"""Four resident adapters on one tree against the frozen base and against PEFT with one adapter: forward and backward.

All three run our tree attention over the same tokens, so that only the adapters differ; the base is the floor.
"""

from __future__ import annotations

from importlib.metadata import version

import peft
import torch
from bench_tree import SMOLLM2_135M, Shape, build, score
from reporting import alternate, cost_row, cpu_seconds, report
from torch import Tensor
from transformers import PreTrainedModel

from mas_hpc.data.token_tree import TokenTree, pack
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import hidden_states
from mas_hpc.models.tree_attention import TreeAttention

SPINE = Shape(trees=1, prompt=120, agents=4, siblings=2, completion=64, cue=4, config=SMOLLM2_135M)
POLICIES = ("planner", "solver", "critic", "verifier")
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOTES = {
    "work": "backbone forward + backward over one tree, float32, frozen base, gradient to the input embeddings; "
    "no LM head, no optimizer",
    "weights": "random, in the shapes of SmolLM2-135M (30 layers, hidden 576, 9 query and 3 key/value heads)",
    "adapters": f"rank {RANK} on {', '.join(TARGETS)}; ours: 4 resident, a quarter of the tokens each; PEFT: 1 on all tokens",
    "cpu_s": "process CPU seconds, one thread, median of 3 repeats in alternation (ours, base, PEFT, ours, ...)",
    "target": "against the base 1 / 1.17: four adapters cost at most 17% more than none",
}


def with_bank() -> tuple[PreTrainedModel, AdapterBank]:
    """Ours."""
    model = build(SMOLLM2_135M, tree=True)
    bank = AdapterBank.install(model, POLICIES, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=0)
    return model, bank


def with_peft() -> PreTrainedModel:
    """One adapter, the model below PEFT's wrapper: its layers are replaced in place."""
    model = build(SMOLLM2_135M, tree=True)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    peft.get_peft_model(model, config)
    return model.eval()


def step(model: PreTrainedModel, tree: TokenTree) -> Tensor:
    """Hidden states and their gradients; new gradients each time."""
    model.zero_grad(set_to_none=True)
    hidden_TD = hidden_states(model, tree.token_T, tree.position_T, TreeAttention(tree.leave_T))
    score(hidden_TD[tree.predictor_N]).backward()
    return hidden_TD.detach()


def main() -> None:
    """Measure, check that all three agree (new adapters change nothing), and report."""
    torch.set_num_threads(1)
    tree = pack(SPINE.samples(), adapters={}, scope="sequence")
    adapter_T = torch.arange(len(tree)) * len(POLICIES) // len(tree)
    (ours, bank), base, theirs = with_bank(), build(SMOLLM2_135M, tree=True), with_peft()

    def bank_step() -> Tensor:
        with bank.route(adapter_T):
            return step(ours, tree)

    steps = (bank_step, lambda: step(base, tree), lambda: step(theirs, tree))
    expected_TD, *others = (work() for work in steps)  # warms up as well
    for hidden_TD in others:
        torch.testing.assert_close(hidden_TD, expected_TD, rtol=1e-4, atol=1e-4)
    assert all(any(parameter.grad is not None for parameter in bank.parameters_of(policy)) for policy in POLICIES)
    bank_s, base_s, peft_s = alternate([lambda work=work: cpu_seconds(work) for work in steps])
    case = f"SmolLM2-135M tree of {len(tree)} tokens: 4 adapters of rank {RANK}"
    rows = [
        cost_row(case=case, metric="cpu_s", ours=bank_s, peer="frozen base, no adapter", theirs=base_s, target=1 / 1.17),
        cost_row(
            case=case, metric="cpu_s", ours=bank_s, peer=f"peft {version('peft')}, one adapter", theirs=peft_s, target=1.0
        ),
    ]
    print(report("adapters", rows, notes=NOTES).name)


if __name__ == "__main__":
    main()
