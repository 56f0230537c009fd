"""A packed tree gives the log-probs and gradients of one row per sample through transformers' own attention."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from mas_hpc_kernels import KernelError, linear_logprob
from mas_hpc_kernels.chunked import product_dtype
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from mas_hpc.data.token_tree import _token_adapters, pack
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import prepare
from mas_hpc.models.heads import ScalarHead
from mas_hpc.models.load import checkpoint_activations
from mas_hpc.training.network import Network, embedding_noise
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


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64).eval()
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
                        id="s", tree=f"q{root}", agent="a", policy=policy, prompt_ids=tuple(state), prompt_spans=tuple(spans),
                        completion_ids=tuple(sibling), advantage=rng.gauss(0, 1), loss_mask=tuple(mask) if any(mask) else (),
                    )
                )  # fmt: skip
            committed, cue = rng.choice(siblings), [rng.randrange(4) for _ in range(rng.randrange(3))]
            state = [*state, *committed, *cue]
            spans += [(policy, len(committed)), ("", len(cue))]
    return samples


def sample(prompt, completion, **fields):
    spans = (("", len(prompt)),)
    return Sample(
        id="s", tree="q", agent="a", policy="p", prompt_ids=prompt, prompt_spans=spans, completion_ids=completion, **fields
    )


def rows(model, samples, *, bank=None, scope="sequence", temperature=1.0):
    """Log-probs and last hidden states at the predictors, by one stock forward a sample."""
    model.set_attn_implementation("sdpa")
    logprobs, states = [], []
    for row in samples:
        if not row.completion_ids:
            continue
        ids = torch.tensor(row.prompt_ids + row.completion_ids)
        if bank is None:
            output = model(ids[None], output_hidden_states=True)
        else:
            with bank.route(torch.tensor(_token_adapters(row, bank.index, scope))):
                output = model(ids[None], output_hidden_states=True)
        found = (output.logits[0] / temperature).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        mask = torch.tensor(row.loss_mask or [True] * len(row.completion_ids))
        logprobs.append(found[len(row.prompt_ids) - 1 :][mask])
        states.append(output.hidden_states[-1][0, len(row.prompt_ids) - 1 : -1][mask])
    prepare(model)
    return torch.cat(logprobs), torch.cat(states)


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def run(network, tree, weight_N=None, **options):
    """Outputs, and the gradients of the weighted sum of the log-probs."""
    with network.run(tree, **options) as outputs:
        (outputs.logprob_N * (1.0 if weight_N is None else weight_N)).sum().backward()
    return outputs, gradients(network.model)


def assert_same(model, samples, tree, *, bank=None, scope="sequence", temperature=1.0):
    weight_N = tree.advantage_N.double() * torch.linspace(0.5, 1.5, len(tree.target_N), dtype=torch.float64)
    expected_N, _ = rows(model, samples, bank=bank, scope=scope, temperature=temperature)
    (expected_N * weight_N).sum().backward()
    expected = gradients(model)
    outputs, got = run(Network(model=model, bank=bank, scope=scope, temperature=temperature), tree, weight_N)
    torch.testing.assert_close(outputs.logprob_N, expected_N, rtol=0, atol=1e-10)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_a_packed_tree_equals_one_row_per_sample(name, seed):
    model, samples = prepare(build(name)), random_samples(seed)
    tree = pack(samples, adapters={}, scope="sequence")
    assert len(tree) < sum(len(row.prompt_ids) + len(row.completion_ids) for row in samples) / 3
    assert_same(model, samples, tree, temperature=[1.0, 0.7, 1.3][seed])


@pytest.mark.parametrize("scope", ["sequence", "speaker"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_packed_tree_equals_rows_with_an_adapter_for_each_policy(name, scope):
    model, samples = build(name), random_samples(7, policies=("solver", "critic"))
    bank = install(model)
    tree = pack(samples, adapters=bank.index, scope=scope)
    assert set(tree.adapter_T.tolist()) == ({0, 1} if scope == "sequence" else {-1, 0, 1})
    assert_same(prepare(model), samples, tree, bank=bank, scope=scope)


def install(model):
    targets = ["q_proj", "v_proj", "down_proj"]
    bank = AdapterBank.install(model, ["solver", "critic"], rank=2, alpha=4.0, target_modules=targets, seed=0)
    torch.manual_seed(1)
    for policy in bank.policies:
        for parameter in bank.parameters_of(policy):
            nn.init.normal_(parameter, std=0.3)  # B starts at zero, which would make the test vacuous
    return bank


@pytest.mark.parametrize("name", CONFIGS)
def test_g12_g13_packed_documents_equal_each_alone(name):
    model = prepare(build(name))
    documents = [row for row in random_samples(3) if row.completion_ids]
    documents = [replace(row, tree=str(number), id=str(number)) for number, row in enumerate(documents)]
    network = Network(model=model)
    together, got = run(network, pack(documents, adapters={}, scope="sequence"))
    alone = [run(network, pack([row], adapters={}, scope="sequence")) for row in documents]
    torch.testing.assert_close(together.logprob_N, torch.cat([out.logprob_N for out, _ in alone]), rtol=0, atol=1e-10)
    total = {key: sum(part[key] for _, part in alone) for key in got}
    torch.testing.assert_close(got, total, rtol=1e-10, atol=1e-10)


def test_g11_a_token_is_predicted_from_the_one_before_it_and_never_across_documents():
    first, second = sample((1, 2), (3, 4, 5)), sample((6, 7), (8, 9))
    tree = pack([first, second], adapters={}, scope="sequence")
    assert tree.target_N.tolist() == [3, 4, 5, 8, 9]
    assert tree.token_T[tree.predictor_N].tolist() == [2, 3, 4, 7, 8]
    assert tree.position_T[tree.predictor_N].tolist() == [1, 2, 3, 1, 2]
    network = Network(model=prepare(build("llama")))
    other = pack([sample((1, 9), (0, 0, 5)), second], adapters={}, scope="sequence")
    before, after = (run(network, packed)[0].logprob_N for packed in (tree, other))
    torch.testing.assert_close(before[3:], after[3:], rtol=0, atol=1e-12)
    assert (before[:3] - after[:3]).abs().min() > 1e-3


def test_g11_a_mask_moves_with_the_targets():
    whole, masked = sample((1, 2), (3, 4, 5)), sample((1, 2), (3, 4, 5), loss_mask=(True, False, True))
    network = Network(model=prepare(build("llama")))
    every, chosen = (run(network, pack([row], adapters={}, scope="sequence"))[0].logprob_N for row in (whole, masked))
    torch.testing.assert_close(chosen, every[[0, 2]], rtol=0, atol=1e-12)


def test_g9_the_temperature_divides_the_logits():
    weight_VD = torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64)
    hidden_ND = torch.ones(3, 1, dtype=torch.float64)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, torch.arange(3), temperature=0.5)
    assert logprob_N.tolist() == pytest.approx([-0.142932, -2.142932, -4.142932], abs=1e-6)
    assert entropy_N[0].item() == pytest.approx(-sum(math.exp(value) * value for value in logprob_N.tolist()))


def test_g9_policy_reference_and_entropy_share_the_temperature():
    model, row = prepare(build("llama")), sample((1, 2), (3, 4))
    network = Network(model=model, temperature=0.6)
    with torch.no_grad(), network.run(pack([row], adapters={}, scope="sequence"), entropy=True) as outputs:
        [annotated] = network.annotate([row], World(), column="reference_logprob", read="logprob")
    model.set_attn_implementation("sdpa")
    logprob = (model(torch.tensor([[1, 2, 3]])).logits[0, 1:] / 0.6).log_softmax(-1)
    torch.testing.assert_close(outputs.logprob_N, logprob[[0, 1], [3, 4]], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs.entropy_N, -(logprob.exp() * logprob).sum(-1), rtol=0, atol=1e-12)
    assert annotated.columns["reference_logprob"] == tuple(outputs.logprob_N.tolist())


def test_g8_bfloat16_logits_are_normalised_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(5, 16, generator=generator).bfloat16()
    weight_VD = torch.randn(40, 16, generator=generator).bfloat16()
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, torch.arange(5))
    assert (logprob_N.dtype, entropy_N.dtype) == (torch.float32, torch.float32)
    dtype = product_dtype(torch.bfloat16, torch.device("cpu"))  # float32 where the CPU has no instructions for bfloat16
    expected = (hidden_ND.to(dtype) @ weight_VD.to(dtype).T).float().log_softmax(-1)
    torch.testing.assert_close(logprob_N, expected[torch.arange(5), torch.arange(5)], rtol=0, atol=1e-6)
    assert not torch.equal(logprob_N, logprob_N.bfloat16().float())


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_survive_recomputation_of_activations(adapted):
    model, samples = build("llama"), random_samples(1, policies=("solver", "critic"))
    bank = install(model) if adapted else None
    prepare(model)
    tree = pack(samples, adapters=bank.index if bank else {}, scope="sequence")
    network = Network(model=model, bank=bank)
    plain, expected = run(network, tree, entropy=True)
    checkpoint_activations(model)
    recomputing, passes = replace(network, checkpointing=True), []
    count = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(model.training))
    outputs, got = run(recomputing, tree, entropy=True)
    count.remove()
    assert len(passes) == 2, "the forward pass, and again in the backward pass"
    assert not model.training
    torch.testing.assert_close(outputs.logprob_N, plain.logprob_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_without_gradients_nothing_is_recomputed_and_the_model_stays_in_evaluation_mode():
    model = prepare(build("llama"))
    checkpoint_activations(model)
    network, modes = Network(model=model, checkpointing=True), []
    model.model.layers[0].register_forward_hook(lambda *_: modes.append(model.training))
    network.annotate([sample((1, 2), (3, 4))], World(), column="c", read="logprob")
    assert modes == [False]


def test_the_head_reads_the_state_before_the_target():
    model, samples = prepare(build("llama")), random_samples(2)
    head = ScalarHead(16, seed=0).double()
    network = Network(model=model, head=head)
    with network.run(pack(samples, adapters={}, scope="sequence"), logprob=False) as outputs:
        score_N = outputs.score_N
    _, state_ND = rows(model, samples)
    torch.testing.assert_close(score_N, head(state_ND), rtol=0, atol=1e-10)
    assert not outputs.logprob_N.numel() and not outputs.entropy_N.numel()


def test_base_leaves_the_adapters_out():
    model, samples = build("llama"), random_samples(4, policies=("solver", "critic"))
    expected_N, _ = rows(model, samples)
    bank = install(model)
    network = Network(model=prepare(model), bank=bank)
    tree = pack(samples, adapters=bank.index, scope="sequence")
    with torch.no_grad(), network.run(tree, base=True) as outputs:
        torch.testing.assert_close(outputs.logprob_N, expected_N, rtol=0, atol=1e-10)
    annotated = network.annotate(samples, World(), column="reference_logprob", read="logprob", base=True)
    values = [value for row in annotated for value in row.columns["reference_logprob"] if not math.isnan(value)]
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected_N.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("budget", [10_000, 20, 1])
def test_annotations_stay_with_their_samples_however_they_are_cut(budget):
    model, samples = prepare(build("llama")), random_samples(5)
    samples = [*samples[::2], *samples[1::2]]  # trees are not contiguous
    network = Network(model=model, max_tree_tokens=budget)
    annotated = network.annotate(samples, World(), column="c", read="logprob")
    expected_N, _ = rows(model, samples)
    assert [row.completion_ids for row in annotated] == [row.completion_ids for row in samples]
    found = [value for row in annotated for value in row.columns["c"]]
    trained = [t for row in samples for t in (row.loss_mask or (True,) * len(row.completion_ids))]
    assert [not math.isnan(value) for value in found] == trained
    values = torch.tensor([value for value in found if not math.isnan(value)], dtype=torch.float64)
    torch.testing.assert_close(values, expected_N.detach(), rtol=0, atol=1e-10)


def test_embedding_noise_is_bounded_by_the_longest_path_through_a_token():
    samples = [sample((1, 2), (3, 4, 5)), sample((1, 2), (6, 7))]
    tree = pack(samples, adapters={}, scope="sequence")  # 1 2 3 4 and 1 2 6: paths of 4 and 3 tokens
    assert tree.token_T.tolist() == [1, 2, 3, 4, 6]
    noise_TD = embedding_noise(tree, 1000, alpha=5.0, generator=torch.Generator().manual_seed(0))
    bound_T = torch.tensor([5 / math.sqrt(length * 1000) for length in (4, 4, 4, 4, 3)])
    assert (noise_TD.abs() <= bound_T[:, None]).all()
    torch.testing.assert_close(noise_TD.abs().amax(1), bound_T, rtol=0.02, atol=0)
    torch.testing.assert_close(noise_TD.std(1), bound_T / math.sqrt(3), rtol=0.1, atol=0)
    again = embedding_noise(tree, 1000, alpha=5.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise_TD, again)


def test_a_head_that_is_more_than_a_matrix_is_refused():
    model = prepare(build("llama"))
    model.lm_head.bias = nn.Parameter(torch.zeros(11))
    with (
        pytest.raises(ConfigError, match="a bias"),
        Network(model=model).run(pack([sample((1,), (2,))], adapters={}, scope="sequence")),
    ):
        pass


def test_the_named_kernels_are_those_that_compute():
    tree = pack([sample((1,), (2,))], adapters={}, scope="sequence")
    with pytest.raises(KernelError, match="triton"), Network(model=prepare(build("llama")), kernels="triton").run(tree):
        pass


def test_adapters_without_a_bank_are_refused():
    tree = pack(random_samples(0), adapters={"shared": 0}, scope="sequence")
    with pytest.raises(ConfigError, match="adapter bank"), Network(model=prepare(build("llama"))).run(tree):
        pass
