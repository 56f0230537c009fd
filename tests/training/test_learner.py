"""One optimizer step: invariant to how the batch is cut, and each policy minds its own parameters."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mas_hpc.config import ATGRPOConfig, SFTConfig
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.attention import prepare
from mas_hpc.training.learner import Learner, schedule, share
from mas_hpc.training.methods import loss_of
from mas_hpc.training.offline import num_trained_tokens
from mas_hpc.types import Sample

METHOD = ATGRPOConfig(steps=10, learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)


@pytest.fixture(autouse=True)
def norms_stay_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32 whatever the dtype."""

    def rms_norm(self: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return prepare(LlamaForCausalLM(config).double().eval())


def samples(num_trees: int = 6) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 19, (n,), generator=generator).tolist())

    found = []
    for tree in range(num_trees):
        prompt = draw(3 + tree)
        for sibling in range(3):
            completion = draw(1 + (tree + sibling) % 4)
            found.append(
                Sample(
                    id=f"{tree}/{sibling}", tree=str(tree), agent="solver", policy=("a", "b")[tree % 2], prompt_ids=prompt,
                    prompt_spans=(("", len(prompt)),), completion_ids=completion, behavior_logprobs=(-2.0,) * len(completion),
                    advantage=float(sibling - 1) + 0.1 * tree,
                )
            )  # fmt: skip
    return found


def learner(
    base: LlamaForCausalLM, bank: AdapterBank | None = None, *, max_tree_tokens: int = 10_000, method=METHOD
) -> Learner:
    return Learner(base, bank, DataParallel(World()), method, scope="sequence", max_tree_tokens=max_tree_tokens)


def gradients(base: LlamaForCausalLM) -> list[torch.Tensor]:
    return [p.grad.clone() for p in base.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", [METHOD, SFTConfig(steps=10, max_grad_norm=1e9)], ids=["at_grpo", "sft"])
def test_g5_loss_and_gradients_do_not_depend_on_the_micro_batches(method) -> None:
    batch = samples()
    results = []
    for budget in (10_000, 40, 1):
        base = model()
        metrics = learner(base, max_tree_tokens=budget, method=method).update(
            batch, loss_of(method), num_tokens=num_trained_tokens(batch)
        )
        results.append((metrics["loss"], metrics["entropy"], gradients(base)))
    for loss, entropy, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        assert entropy == pytest.approx(results[0][1], rel=1e-12)
        for a, b in zip(grads, results[0][2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_shares_of_the_ranks_are_a_partition_of_whole_trees() -> None:
    batch = samples()
    shares = [share(batch, rank, 2) for rank in range(2)]
    assert sorted(s.id for part in shares for s in part) == sorted(s.id for s in batch)
    assert not {s.tree for s in shares[0]} & {s.tree for s in shares[1]}
    tokens = [sum(len(s.completion_ids) for s in part) for part in shares]
    assert max(tokens) < 2 * min(tokens)
    assert share(batch[:3], 1, 2) == []  # one tree, two ranks: the second joins with nothing


def test_the_shares_of_two_ranks_sum_to_the_whole_gradient() -> None:
    batch = samples()
    whole, parts = model(), [model(), model()]
    learner(whole).update(batch, loss_of(METHOD), num_tokens=60)
    for rank, part in enumerate(parts):
        learner(part).update(share(batch, rank, 2), loss_of(METHOD), num_tokens=60)
    for total, *pieces in zip(gradients(whole), *map(gradients, parts), strict=True):
        torch.testing.assert_close(sum(pieces), total, rtol=1e-9, atol=1e-12)


def test_an_idle_adapter_does_not_move() -> None:
    base = model()
    bank = AdapterBank.install(base, ["a", "b"], rank=2, alpha=4.0, target_modules=["q_proj", "down_proj"], seed=0)
    method = METHOD.model_copy(update={"weight_decay": 0.1})
    optimizer = learner(base, bank, method=method)
    both = samples()
    optimizer.update(both, loss_of(method), num_tokens=60)  # gives both adapters momentum
    before = {policy: copy.deepcopy(bank.parameters_of(policy)) for policy in bank.policies}
    optimizer.update([s for s in both if s.policy == "a"], loss_of(method), num_tokens=60)
    assert all(torch.equal(x, y) for x, y in zip(before["b"], bank.parameters_of("b"), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(before["a"], bank.parameters_of("a"), strict=True))


def test_policies_are_clipped_one_by_one() -> None:
    base = model()
    bank = AdapterBank.install(base, ["a", "b"], rank=2, alpha=4.0, target_modules=["q_proj"], seed=0)
    method = METHOD.model_copy(update={"max_grad_norm": 1e-3})
    loud = [replace(s, advantage=s.advantage * (1000.0 if s.policy == "a" else 1.0)) for s in samples()]
    learner(base, bank, method=method).update(loud, loss_of(method), num_tokens=60)
    for policy in bank.policies:
        norm = torch.stack([p.grad.norm() for p in bank.parameters_of(policy)]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_batch_without_samples_changes_nothing_but_the_schedule() -> None:
    base = model()
    before = copy.deepcopy(base.state_dict())
    metrics = learner(base).update([], loss_of(METHOD), num_tokens=1)
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_the_schedule_warms_up_holds_and_decays_to_the_last_share() -> None:
    method = ATGRPOConfig(steps=10, warmup_steps=1, decay_fraction=0.4, min_ratio=0.2)
    # decay over the last 4 steps: left = 1, .75, .5, .25 from step 6 on
    assert [schedule(method, step) for step in (0, 1, 5, 6, 8, 9, 10)] == pytest.approx([0.5, 1, 1, 1, 0.6, 0.4, 0.2])


def test_the_schedule_counts_batches_however_many_updates_each_gives() -> None:
    method = ATGRPOConfig(steps=4, warmup_steps=0, updates_per_batch=3)
    base, batch = model(), samples()
    optimizer = Learner(
        base, None, DataParallel(World()), method, scope="sequence", max_tree_tokens=10_000, updates_per_batch=3
    )
    rates = [optimizer.update(batch, loss_of(method), num_tokens=60)["learning_rate"] for _ in range(12)]
    assert rates == pytest.approx([method.learning_rate * schedule(method, step // 3) for step in range(12)])


class SummedByTwo(DataParallel):
    """As on a rank whose peer has no gradient either: what is missing counts as zero."""

    def sum_gradients(self, parameters) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def test_a_batch_without_samples_changes_nothing_on_several_ranks_either() -> None:
    base = model()
    optimizer = Learner(base, None, SummedByTwo(World()), METHOD, scope="sequence", max_tree_tokens=10_000)
    optimizer.update(samples(), loss_of(METHOD), num_tokens=60)  # gives momentum
    before = copy.deepcopy(base.state_dict())
    optimizer.update([], loss_of(METHOD), num_tokens=1)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_learning_lowers_the_loss() -> None:
    base, batch = model(), samples()
    method = SFTConfig(steps=20, learning_rate=1e-2, warmup_steps=0)
    optimizer = learner(base, method=method)
    losses = [optimizer.update(batch, loss_of(method), num_tokens=num_trained_tokens(batch))["loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
