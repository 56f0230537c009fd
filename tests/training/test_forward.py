"""A packed tree gives the log-probs and gradients of one row per sample through transformers' own attention."""

import random

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mas_hpc.data.token_tree import _token_adapters, pack
from mas_hpc.errors import ConfigError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import prepare
from mas_hpc.training.forward import forward
from mas_hpc.types import Sample

SHAPE = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=4, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=11, n_embd=16, n_layer=2, n_head=4, n_positions=200, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


@pytest.fixture(autouse=True)
def norms_stay_in_float64(monkeypatch):
    """transformers computes RMSNorm in float32 whatever the model's dtype, which would hide errors above 1e-8."""

    def rms_norm(self, hidden):
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", rms_norm)


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def random_samples(seed, policies=("shared",)):
    """Several roots and levels; few letters, so that siblings coincide; empty and one-token completions; masks."""
    rng = random.Random(seed)
    samples = []
    for root in range(3):
        state, spans = [rng.randrange(4) for _ in range(rng.randrange(1, 7))], []
        spans.append(("", len(state)))
        for turn in range(4):
            policy = policies[turn % len(policies)]
            siblings = [[rng.randrange(3) for _ in range(rng.choice([0, 1, 1, 2, 5, 9]))] for _ in range(5)]
            for sibling in siblings:
                mask = [rng.random() < 0.8 for _ in sibling]
                samples.append(
                    Sample(
                        id="s",
                        tree=f"q{root}",
                        agent="a",
                        policy=policy,
                        prompt_ids=tuple(state),
                        prompt_spans=tuple(spans),
                        completion_ids=tuple(sibling),
                        advantage=rng.gauss(0, 1),
                        loss_mask=tuple(mask) if any(mask) else (),
                    )
                )
            committed, cue = rng.choice(siblings), [rng.randrange(4) for _ in range(rng.randrange(3))]
            state = [*state, *committed, *cue]
            spans += [(policy, len(committed)), ("", len(cue))]
    return samples


def row_logprobs(model, samples, *, bank=None, scope="sequence", temperature=1.0):
    """One stock forward per sample."""
    model.set_attn_implementation("sdpa")
    rows = []
    for sample in samples:
        if not sample.completion_ids:
            continue
        ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
        if bank is None:
            logits = model(ids[None]).logits[0]
        else:
            with bank.route(torch.tensor(_token_adapters(sample, bank.index, scope))):
                logits = model(ids[None]).logits[0]
        logprobs = (logits / temperature).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        mask = torch.tensor(sample.loss_mask or [True] * len(sample.completion_ids))
        rows.append(logprobs[len(sample.prompt_ids) - 1 :][mask])
    prepare(model)
    return torch.cat(rows)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, samples, tree, **options):
    bank, temperature = options.get("bank"), options.get("temperature", 1.0)
    weight_N = tree.advantage_N.double() * torch.linspace(0.5, 1.5, len(tree.target_N), dtype=torch.float64)
    expected_N = row_logprobs(model, samples, **options)
    expected = gradients(model, (expected_N * weight_N).sum())
    logprob_N, _ = forward(model, tree, bank=bank, temperature=temperature, need_entropy=False)
    got = gradients(model, (logprob_N * weight_N).sum())
    torch.testing.assert_close(logprob_N, expected_N, rtol=0, atol=1e-10)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_a_packed_tree_equals_one_row_per_sample(name, seed):
    model, samples = prepare(build(name)), random_samples(seed)
    tree = pack(samples, adapters={}, scope="sequence")
    rows = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples)
    assert len(tree) < rows / 3
    assert_same(model, samples, tree, temperature=[1.0, 0.7, 1.3][seed])


@pytest.mark.parametrize("scope", ["sequence", "speaker"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_packed_tree_equals_rows_with_an_adapter_for_each_policy(name, scope):
    model, samples = build(name), random_samples(7, policies=("solver", "critic"))
    targets = ["q_proj", "v_proj", "down_proj"]
    bank = AdapterBank.install(model, ["solver", "critic"], rank=2, alpha=4.0, target_modules=targets, seed=0)
    for policy in bank.policies:
        for parameter in bank.parameters_of(policy):
            nn.init.normal_(parameter, std=0.3)  # B starts at zero, which would make the test vacuous
    tree = pack(samples, adapters=bank.index, scope=scope)
    assert set(tree.adapter_T.tolist()) == ({0, 1} if scope == "sequence" else {-1, 0, 1})
    assert_same(prepare(model), samples, tree, bank=bank, scope=scope)


def test_gradients_survive_recomputation_of_activations():
    model, samples = prepare(build("llama")), random_samples(1)
    tree = pack(samples, adapters={}, scope="sequence")
    plain = gradients(model, forward(model, tree, need_entropy=False)[0].sum())
    model.train()
    model.activation_checkpointing_enable()
    recomputed = gradients(model, forward(model, tree, need_entropy=False)[0].sum())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-12)


def test_entropy_is_that_of_the_predicting_distribution():
    model = prepare(build("llama"))
    sample = Sample(id="s", tree="q", agent="a", policy="p", prompt_ids=(1, 2), prompt_spans=(("", 2),), completion_ids=(3, 4))
    _, entropy_N = forward(model, pack([sample], adapters={}, scope="sequence"), need_entropy=True)
    model.set_attn_implementation("sdpa")
    probs = model(torch.tensor([[1, 2, 3]])).logits[0, 1:].softmax(-1)
    torch.testing.assert_close(entropy_N, -(probs * probs.log()).sum(-1).detach(), rtol=0, atol=1e-12)


def test_a_head_that_is_more_than_a_matrix_is_refused():
    model = prepare(build("llama"))
    tree = pack(random_samples(0), adapters={}, scope="sequence")
    model.lm_head.bias = nn.Parameter(torch.zeros(11))
    with pytest.raises(ConfigError, match="a bias"):
        forward(model, tree, need_entropy=False)


def test_adapters_without_a_bank_are_refused():
    tree = pack(random_samples(0), adapters={"shared": 0}, scope="sequence")
    with pytest.raises(ConfigError, match="adapter bank"):
        forward(prepare(build("llama")), tree, need_entropy=False)
