"""The bank against merged weights in float64, against peft itself, and under a real AdamW."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models import attention
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.tree_attention import TreeAttention
from mas_hpc.prefix_tree import merge as merge_rows

POLICIES = ("solver", "critic", "verifier")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 6.0


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def install(
    model: LlamaForCausalLM, policies: tuple[str, ...] = POLICIES, *, seed: int = 5, rank_stabilized: bool = False,
    targets: tuple[str, ...] = TARGETS,
) -> AdapterBank:  # fmt: skip
    bank = AdapterBank.install(
        model, policies, rank=RANK, alpha=ALPHA, target_modules=targets, seed=seed, rank_stabilized=rank_stabilized
    )
    generator = torch.Generator().manual_seed(seed + 100)
    for policy in policies:
        for tensor in bank.parameters_of(policy):  # B is zero at the start, which would make every equality vacuous
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return bank


def rows_attention(row_T: Tensor) -> attention.Attend:
    """Causal attention within each row of a flat batch."""
    mask_TT = (row_T[:, None] == row_T[None]).tril()

    def attend(layer: int, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> Tensor:
        group = len(query_HTD) // len(key_KTD)
        key_HTD, value_HTD = key_KTD.repeat_interleave(group, 0), value_KTD.repeat_interleave(group, 0)
        score_HTT = (query_HTD @ key_HTD.mT * scaling).masked_fill(~mask_TT, -torch.inf)
        return (score_HTT.softmax(-1) @ value_HTD).transpose(0, 1)

    return attend


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaRMSNorm computes in float32 whatever its input; this one keeps float64."""

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, rows and adapters of four rows; the last row is the base model's."""
    lengths, adapters = (5, 3, 7, 4), (2, 0, 2, -1)
    token_T = torch.randint(29, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    position_T = torch.cat([torch.arange(length) for length in lengths])
    row_T = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    return token_T, position_T, row_T, torch.tensor(adapters)[row_T]


def forward(bank: AdapterBank, model: LlamaForCausalLM) -> Tensor:
    token_T, position_T, row_T, adapter_T = batch()
    with bank.route(adapter_T):
        return attention.hidden_states(model, token_T, position_T, rows_attention(row_T))


def test_mixed_row_equals_merged_weights_row_by_row_in_values_and_gradients(exact_norm):
    model, plain = llama(torch.float64), llama(torch.float64)
    bank = install(attention.prepare(model))
    hidden_TD = forward(bank, model)
    weight_TD = torch.randn(hidden_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (hidden_TD * weight_TD).sum().backward()

    factors = {policy: {k: t.requires_grad_() for k, t in bank.tensors(policy).items()} for policy in POLICIES}
    token_T, _, row_T, adapter_T = batch()
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        index = int(adapter_T[row_T == row][0])
        merged = merge(plain, factors[POLICIES[index]]) if index >= 0 else dict(plain.named_parameters())
        arguments = {"input_ids": token_T[row_T == row][None], "output_hidden_states": True}
        output = torch.func.functional_call(plain, merged, (), arguments)
        torch.testing.assert_close(hidden_TD[row_T == row], output.hidden_states[-1][0], rtol=0, atol=1e-10)
        loss = loss + (output.hidden_states[-1][0] * weight_TD[row_T == row]).sum()
    loss.backward()

    assert all(parameter.grad is None for parameter in bank.parameters_of("critic"))
    for policy in ("solver", "verifier"):
        for parameter, factor in zip(bank.parameters_of(policy), factors[policy].values(), strict=True):
            expected = factor.grad if factor.shape == parameter.shape else factor.grad.T
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)


def merge(model: LlamaForCausalLM, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights plus alpha / rank * B @ A wherever the adapter has factors."""
    merged = dict(model.named_parameters())
    for key, a in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            merged[name] = merged[name] + ALPHA / RANK * factors[key.replace("lora_A", "lora_B")] @ a
    return merged


def test_decoding_without_gradient_sees_every_write_and_move_of_the_parameters():
    model = attention.prepare(llama())
    bank = install(model)
    for change in (lambda: None, lambda: [p.data.mul_(0.5) for p in bank.parameters_of("solver")], model.double):
        change()
        with torch.no_grad():
            served_TD = forward(bank, model)
        torch.testing.assert_close(served_TD, forward(bank, model).detach(), rtol=1e-5, atol=1e-5)


def test_a_new_bank_and_no_route_are_the_base_model():
    model = attention.prepare(llama())
    token_T, position_T, row_T, adapter_T = batch()

    def run() -> Tensor:
        return attention.hidden_states(model, token_T, position_T, rows_attention(row_T)).detach()

    base_TD = run()
    bank = AdapterBank.install(model, POLICIES, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=0)
    assert bank.index == {"solver": 0, "critic": 1, "verifier": 2}
    assert torch.equal(run(), base_TD)
    with bank.route(adapter_T):
        assert torch.equal(run(), base_TD)
    install_again = [p.detach().clone() for p in bank.parameters_of("critic")]
    other = AdapterBank.install(llama(), POLICIES[:2], rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=0)
    assert all(map(torch.equal, install_again, other.parameters_of("critic")))
    assert not torch.equal(bank.parameters_of("solver")[0], bank.parameters_of("critic")[0])
    for nothing in (None, torch.full_like(adapter_T, -1)):
        with bank.route(nothing):
            assert torch.equal(run(), base_TD)


def test_route_refuses_another_length_and_nesting_and_ends_with_its_block():
    model = attention.prepare(llama())
    bank = install(model)
    token_T, position_T, row_T, adapter_T = batch()
    with bank.route(adapter_T[:-1]), pytest.raises(AssertionError, match="flat row of 18 tokens"):
        attention.hidden_states(model, token_T, position_T, rows_attention(row_T))
    with bank.route(None), pytest.raises(AssertionError, match="open already"), bank.route(adapter_T):
        pass
    with pytest.raises(AssertionError, match="adapter 3 of 3"), bank.route(adapter_T + 1):
        pass
    model(input_ids=token_T[None], attend=rows_attention(row_T))


def test_adapter_without_tokens_does_not_move_under_adamw():
    model = attention.prepare(llama())
    bank = install(model)
    optimizer = torch.optim.AdamW([{"params": bank.parameters_of(p)} for p in POLICIES], lr=0.1, weight_decay=0.1)
    for parameter in model.parameters():  # momentum for all, as after a step with everyone
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    before = {policy: [p.detach().clone() for p in bank.parameters_of(policy)] for policy in POLICIES}

    optimizer.zero_grad(set_to_none=True)
    forward(bank, model).sum().backward()
    optimizer.step()
    assert all(map(torch.equal, before["critic"], bank.parameters_of("critic")))
    for policy in ("solver", "verifier"):
        assert not any(map(torch.equal, before[policy], bank.parameters_of(policy)))


def logits_of(bank: AdapterBank, model: LlamaForCausalLM, policy: str) -> tuple[Tensor, Tensor]:
    """One row of tokens and its logits under one policy."""
    token_T = batch()[0]
    with torch.no_grad(), bank.route(torch.full_like(token_T, bank.index[policy])):
        attend = rows_attention(torch.zeros_like(token_T))
        hidden_TD = attention.hidden_states(model, token_T, torch.arange(len(token_T)), attend)
        return token_T, model.get_output_embeddings()(hidden_TD)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_export_gives_the_same_logits_in_peft_and_comes_back_bit_equal(tmp_path: Path, rank_stabilized: bool):
    model = attention.prepare(llama())
    bank = install(model, rank_stabilized=rank_stabilized)
    bank.export("critic", tmp_path / "critic", base_model="tiny")
    served = peft.PeftModel.from_pretrained(llama(), tmp_path / "critic").eval()
    token_T, logits_TV = logits_of(bank, model, "critic")
    with torch.no_grad():
        expected_TV = served(input_ids=token_T[None]).logits[0]
        base_TV = llama()(input_ids=token_T[None]).logits[0]
    assert (expected_TV - base_TV).abs().max() > 0.1
    assert (logits_TV - expected_TV).abs().max() < 1e-5 * expected_TV.abs().max()

    other = install(llama(), seed=9, rank_stabilized=rank_stabilized)
    other.load("solver", tmp_path / "critic")
    assert all(map(torch.equal, other.parameters_of("solver"), bank.parameters_of("critic")))
    with pytest.raises(CheckpointError, match=f"set adapters.rank_stabilized={rank_stabilized}"):
        install(llama(), rank_stabilized=not rank_stabilized).load("solver", tmp_path / "critic")


def test_rank_stabilized_adapters_are_scaled_by_the_square_root_of_the_rank():
    plain, stabilized = llama(torch.float64), llama(torch.float64)
    banks = install(plain), install(stabilized, rank_stabilized=True)
    name = "model.layers.0.mlp.up_proj.weight"
    base = plain.state_dict()[name]
    deltas = [
        bank.merged_state_dict(model, "solver")[name] - base for bank, model in zip(banks, (plain, stabilized), strict=True)
    ]
    torch.testing.assert_close(deltas[1], deltas[0] * 3**0.5, rtol=1e-10, atol=1e-12)  # 6 / sqrt(3) against 6 / 3


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS])
def test_an_adapter_that_peft_wrote_gives_peft_s_logits(tmp_path: Path, targets: tuple[str, ...]):
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), task_type="CAUSAL_LM", use_rslora=True)
    theirs = peft.get_peft_model(llama(), config).eval()
    generator = torch.Generator().manual_seed(8)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(tmp_path)

    model = attention.prepare(llama())
    bank = install(model, targets=targets, rank_stabilized=True)
    bank.load("verifier", tmp_path)
    token_T, logits_TV = logits_of(bank, model, "verifier")
    with torch.no_grad():
        expected_TV = theirs(input_ids=token_T[None]).logits[0]
    assert (logits_TV - expected_TV).abs().max() < 1e-5 * expected_TV.abs().max()

    other = install(llama(), targets=("q_proj", "k_proj"), rank_stabilized=True)
    with pytest.raises(CheckpointError, match=r"the bank has \['k_proj', 'q_proj'\]; set adapters.target_modules=.*'v_proj'"):
        other.load("verifier", tmp_path)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merged_weights_are_a_plain_model_with_the_adapted_logits(exact_norm, tmp_path: Path, rank_stabilized: bool):
    model = attention.prepare(llama(torch.float64))
    bank = install(model, rank_stabilized=rank_stabilized)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=bank.merged_state_dict(model, "critic"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    token_T, adapted_TV = logits_of(bank, model, "critic")
    with torch.no_grad():
        merged_TV, base_TV = (plain(input_ids=token_T[None]).logits[0] for plain in (loaded, llama(torch.float64)))
    assert (adapted_TV - base_TV).abs().max() > 0.1
    torch.testing.assert_close(merged_TV, adapted_TV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("adapted", [True, False])
def test_activation_checkpointing_gives_the_same_gradients_while_the_route_stays_open(exact_norm, adapted: bool):
    """Along a tree; with adapters or all weights trained."""
    tree = merge_rows([[1, 2, 3, 4], [1, 2, 5], [1, 6, 7, 8], [9, 10]])
    token_T, position_T = torch.from_numpy(tree.token_T), torch.from_numpy(tree.position_T)
    adapter_T = torch.arange(len(token_T)) % 4 - 1
    results = []
    for recompute in (False, True):
        model = attention.prepare(llama(torch.float64))
        bank = install(model, POLICIES if adapted else POLICIES[:1])
        if not adapted:
            model.requires_grad_(True)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        calls: list[int] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with bank.route(adapter_T if adapted else None):
            hidden_TD = attention.hidden_states(model, token_T, position_T, TreeAttention(tree.leave_T, limit=3))
            (hidden_TD * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum().backward()
        assert len(calls) == (4 if recompute else 2)  # of two layers
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = results
    assert plain.keys() == recomputed.keys() and max(grad.abs().max() for grad in plain.values()) > 1e-2
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=0, atol=1e-12)


def test_a_route_closed_before_recomputation_is_an_error_not_a_wrong_gradient():
    model = attention.prepare(llama())
    bank = install(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    hidden_TD = forward(bank, model)
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different number of tensors"):
        hidden_TD.sum().backward()


def test_noise_is_added_to_the_input_embeddings_of_each_token():
    model, other = (attention.prepare(llama(torch.float64)) for _ in range(2))
    for one in (model, other):
        one.lm_head.weight = torch.nn.Parameter(one.lm_head.weight.detach().clone())
    token_T, position_T = torch.tensor([3, 1, 4, 7]), torch.arange(4)
    noise_TD = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    other.model.embed_tokens.weight.data[token_T] += noise_TD
    attend = rows_attention(torch.zeros_like(token_T))
    noisy_TD = attention.hidden_states(model, token_T, position_T, attend, noise_TD=noise_TD)
    torch.testing.assert_close(noisy_TD, attention.hidden_states(other, token_T, position_T, attend))
    quiet_TD = attention.hidden_states(model, token_T, position_T, attend, noise_TD=torch.zeros_like(noise_TD))
    assert torch.equal(quiet_TD, attention.hidden_states(model, token_T, position_T, attend))
    noisy_TD.sum().backward()
    assert model.model.embed_tokens.weight.grad[token_T].abs().sum() > 0  # embeddings still train


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "cannot read a PEFT adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"), "cannot read a PEFT adapter"),
        (lambda folder: rewrite(folder, r=4), "set adapters.rank=4"),
        (lambda folder: rewrite(folder, lora_alpha=8), "set adapters.alpha=8"),
        (lambda folder: rewrite(folder, use_rslora=True), "set adapters.rank_stabilized=True"),
        (lambda folder: rewrite(folder, target_modules=["q_proj"]), r"set adapters.target_modules=\['q_proj'\]"),
        (lambda folder: rewrite(folder, use_dora=True), "only plain LoRA"),
        (lambda folder: rewrite(folder, peft_type="LOHA"), "only plain LoRA"),
        (lambda folder: rewrite(folder, init_lora_weights="pissa"), "convert it to plain LoRA"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str):
    bank = install(llama())
    bank.export("solver", tmp_path, base_model="tiny")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        bank.load("solver", tmp_path)


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tensors_of_another_model_are_refused_before_anything_is_written():
    bank = install(llama())
    before = bank.tensors("solver")
    other = {key: tensor + 1 for key, tensor in before.items()}
    key = next(key for key in before if "q_proj.lora_B" in key)
    for wrong, message in (
        ({}, "lora_A.weight has shape missing"),
        (other | {key: other[key][:, :2]}, r"has shape \(16, 2\), expected \(16, 3\)"),
        (other | {"stranger": other[key]}, "stranger has shape .* expected no such tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            bank.assign("solver", wrong)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bank.tensors("solver").items())


def test_an_export_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write the adapter of policy 'solver'"):
        install(llama()).export("solver", tmp_path / "file", base_model="tiny")


def test_unknown_target_modules_are_refused_with_the_available_names():
    for target in ("c_attn", "lm_head", "embed_tokens"):
        with pytest.raises(ConfigError, match=rf"\['{target}'\] are no linear layers.*'down_proj', 'gate_proj', 'k_proj'"):
            AdapterBank.install(llama(), POLICIES, rank=1, alpha=1.0, target_modules=("q_proj", target), seed=0)
    with pytest.raises(ConfigError, match="expected at least one of"):
        AdapterBank.install(llama(), POLICIES, rank=1, alpha=1.0, target_modules=(), seed=0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"\['c_attn'\] of gpt2 are Conv1D"):
        AdapterBank.install(gpt2, POLICIES, rank=1, alpha=1.0, target_modules=("c_attn",), seed=0)
