"""The optimizer step: shares of the ranks, schedules, optimizers, and each policy minds its own parameters."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from mas_hpc.config_methods import ATGRPOConfig, Optimization, RewardModelConfig, SFTConfig
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.models.heads import ScalarHead
from mas_hpc.training.learner import Learner, build_optimizer, schedule
from mas_hpc.training.methods import offline_objective, policy_objective
from mas_hpc.training.network import Network
from mas_hpc.training.share import Totals, share

METHOD = ATGRPOConfig(steps=10, learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)
POLICY = policy_objective(METHOD, kl_coefficient=0.0, max_length=10)
SFT = offline_objective(SFTConfig())
REWARD = offline_objective(RewardModelConfig(objective="outcome"))


def take(samples, *columns):
    """The samples with these columns alone."""
    return [replace(s, columns={name: s.columns[name] for name in columns}) for s in samples]


def install(model, targets=("q_proj", "down_proj")) -> AdapterBank:
    return AdapterBank.install(model, ["a", "b"], rank=2, alpha=4.0, target_modules=targets, seed=0)


def learner(network: Network, optimization: Optimization = METHOD, **options) -> Learner:
    return Learner(network, DataParallel(World()), optimization, **options)


def snapshot(parameters) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def moved(before, parameters) -> bool:
    return not all(torch.equal(x, y) for x, y in zip(before, parameters, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_torch_knows_that_a_step_has_changed_the_weights(make_model, make_samples, optimizer: str) -> None:
    """An engine drops keys, values and packed weights of others by it."""
    network = Network(model=make_model())
    before = [parameter._version for parameter in network.model.parameters()]
    learner(network, METHOD.model_copy(update={"optimizer": optimizer})).update(
        take(make_samples()), POLICY, Totals.of(make_samples())
    )
    assert all(new._version > old for new, old in zip(network.model.parameters(), before, strict=True))


# ---- ranks


def test_shares_of_the_ranks_are_a_partition_of_whole_trees(make_samples) -> None:
    batch = make_samples()
    shares = [share(batch, rank, 2, hidden_size=16) for rank in range(2)]
    assert sorted(s.id for part in shares for s in part) == sorted(s.id for s in batch)
    assert not {s.tree for s in shares[0]} & {s.tree for s in shares[1]}
    tokens = [sum(len(s.completion_ids) for s in part) for part in shares]
    assert max(tokens) < 2 * min(tokens)
    assert share(batch[:4], 1, 2, hidden_size=16) == []  # one tree, two ranks: the second joins with nothing


def test_a_pair_stays_in_its_order_in_every_share(make_samples) -> None:
    batch = make_samples()
    for size in (1, 2, 4):
        labels = [s.label for rank in range(size) for s in share(batch, rank, size, hidden_size=16)]
        assert labels == [1.0, 0.0] * (len(batch) // 2)


def test_totals_count_trained_tokens_and_the_samples_that_have_one(make_samples) -> None:
    first, second, third, *_ = make_samples()  # completions of 1, 2 and 3 tokens
    samples = [first, replace(second, completion_ids=()), replace(third, loss_mask=(True, False, True))]
    assert Totals.of(samples) == Totals(num_tokens=3, num_samples=2)
    assert Totals.of([]) == Totals(num_tokens=1, num_samples=1)


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_leaves_weights_alone_that_the_loss_does_not_use(make_model, make_samples, tied: bool) -> None:
    model = make_model(tied=tied)
    head = ScalarHead(16, seed=0).double()
    optimizer = learner(Network(model=model, head=head), METHOD.model_copy(update={"weight_decay": 0.1}))
    before = snapshot([model.lm_head.weight])
    optimizer.update(take(make_samples()), REWARD, Totals.of(make_samples()))
    assert moved(before, [model.lm_head.weight]) == tied  # tied, it is the embedding


# ---- policies


def test_an_idle_adapter_does_not_move(make_model, make_samples) -> None:
    base = make_model()
    bank = install(base)
    optimizer = learner(Network(model=base, bank=bank), METHOD.model_copy(update={"weight_decay": 0.1}))
    both = take(make_samples())
    optimizer.update(both, POLICY, Totals.of(both))  # gives both adapters momentum
    before = {policy: snapshot(bank.parameters_of(policy)) for policy in bank.policies}
    optimizer.update([s for s in both if s.policy == "a"], POLICY, Totals.of(both))
    assert not moved(before["b"], bank.parameters_of("b"))
    assert moved(before["a"], bank.parameters_of("a"))


def test_in_speaker_scope_an_adapter_whose_tokens_are_only_read_is_summed_and_clipped(make_model, make_samples) -> None:
    base = make_model()
    bank = install(base)
    for policy in bank.policies:
        for parameter in bank.parameters_of(policy):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    read = [
        replace(s, policy="a", prompt_spans=(("b", 2), ("", len(s.prompt_ids) - 2)), advantage=9.0)
        for s in take(make_samples())
    ]

    class Counting(DataParallel):
        summed: tuple[int, ...] = ()

        def sum_gradients(self, parameters) -> None:
            self.summed = tuple(id(parameter) for parameter in parameters)

    strategy = Counting(World())
    method = METHOD.model_copy(update={"max_grad_norm": 1e-3})
    before = snapshot(bank.parameters_of("b"))
    Learner(Network(model=base, bank=bank, scope="speaker"), strategy, method).update(read, POLICY, Totals.of(read))
    assert {id(parameter) for parameter in bank.parameters_of("b")} <= set(strategy.summed)
    assert moved(before, bank.parameters_of("b"))
    norm = torch.stack([p.grad.norm() for p in bank.parameters_of("b")]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_policies_are_clipped_one_by_one(make_model, make_samples) -> None:
    base = make_model()
    bank = install(base)
    loud = [replace(s, advantage=s.advantage * (1000.0 if s.policy == "a" else 1.0)) for s in take(make_samples())]
    method = METHOD.model_copy(update={"max_grad_norm": 1e-3})
    metrics = learner(Network(model=base, bank=bank), method).update(loud, POLICY, Totals.of(loud))
    for policy in bank.policies:
        norm = torch.stack([p.grad.norm() for p in bank.parameters_of(policy) if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-2)
    assert metrics["grad_norm"] > 1.0, "before clipping, of the loudest"


def test_the_head_is_trained_with_the_shared_model(make_model, make_samples) -> None:
    model, head = make_model(), ScalarHead(16, seed=0).double()
    optimizer = learner(Network(model=model, head=head))
    parameters = [*model.parameters(), *head.parameters()]
    assert {id(p) for p in optimizer.trained} == {id(p) for p in parameters}
    before = snapshot(head.parameters()), snapshot(model.parameters())
    optimizer.update(take(make_samples()), REWARD, Totals.of(make_samples()))
    assert moved(before[0], head.parameters()) and moved(before[1], model.parameters())


def test_with_a_bank_the_head_is_a_group_of_its_own(make_model, make_samples) -> None:
    model, head = make_model(), ScalarHead(16, seed=0).double()
    bank = install(model)
    method = METHOD.model_copy(update={"max_grad_norm": 1e-3})
    optimizer = learner(Network(model=model, bank=bank, head=head), method)
    groups = [bank.parameters_of("a"), bank.parameters_of("b"), list(head.parameters())]
    assert [id(p) for p in optimizer.trained] == [id(p) for group in groups for p in group]
    before = [snapshot(group) for group in (*groups, model.get_input_embeddings().parameters())]
    only_a = [s for s in take(make_samples()) if s.policy == "a"]
    optimizer.update(only_a, REWARD, Totals.of(only_a))
    assert moved(before[0], groups[0]) and moved(before[2], groups[2])
    assert not moved(before[1], groups[1]) and not moved(before[3], model.get_input_embeddings().parameters())
    norm = torch.stack([p.grad.norm() for p in head.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2), "clipped apart from the adapter"


# ---- batches without samples


class SummedByTwo(DataParallel):
    """As on a rank whose peer has no gradient either: what is missing counts as zero."""

    def sum_gradients(self, parameters) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("strategy", [DataParallel, SummedByTwo])
def test_a_batch_without_samples_changes_nothing_but_the_schedule(make_model, make_samples, strategy) -> None:
    base = make_model()
    optimizer = Learner(Network(model=base), strategy(World()), METHOD)
    optimizer.update(take(make_samples()), POLICY, Totals.of(make_samples()))  # gives momentum
    before = copy.deepcopy(base.state_dict())
    metrics = optimizer.update([], POLICY, Totals.of([]))
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


# ---- schedule and optimizers


def test_warm_up_stable_decay() -> None:
    method = ATGRPOConfig(steps=10, warmup_steps=1, decay_fraction=0.4, min_ratio=0.2)
    # decay over the last 4 steps: left = 1, .75, .5, .25 from step 6 on
    assert [schedule(method, step) for step in (0, 1, 5, 6, 8, 9, 10)] == pytest.approx([0.5, 1, 1, 1, 0.6, 0.4, 0.2])


def test_linear_cosine_and_constant_schedules() -> None:
    linear = Optimization(steps=8, learning_rate=1.0, warmup_steps=0, min_ratio=0.1)
    cosine, constant = linear.model_copy(update={"decay": "cosine"}), linear.model_copy(update={"decay_fraction": 0.0})
    assert [schedule(linear, step) for step in (0, 2, 4, 8)] == pytest.approx([1.0, 0.775, 0.55, 0.1])
    half = 0.5 * (1 - math.cos(0.75 * math.pi))
    assert [schedule(cosine, step) for step in (0, 2, 4, 8)] == pytest.approx([1.0, 0.1 + 0.9 * half, 0.55, 0.1])
    assert [schedule(constant, step) for step in (0, 3, 8)] == [1.0, 1.0, 1.0]
    warm = constant.model_copy(update={"warmup_steps": 3, "decay": "cosine"})
    assert [schedule(warm, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_the_schedule_counts_batches_however_many_updates_each_gives(make_model, make_samples) -> None:
    method = ATGRPOConfig(steps=4, warmup_steps=0)
    batch = take(make_samples(2))
    optimizer = learner(Network(model=make_model()), method, updates_per_batch=3)
    rates = [optimizer.update(batch, POLICY, Totals.of(batch))["learning_rate"] for _ in range(12)]
    assert rates == pytest.approx([method.learning_rate * schedule(method, step // 3) for step in range(12)])


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-2), ("adafactor", 1e-1)])
def test_learning_lowers_the_loss(make_model, make_samples, name: str, rate: float) -> None:
    base, batch = make_model(), take(make_samples())
    optimizer = learner(Network(model=base), SFTConfig(steps=20, learning_rate=rate, warmup_steps=0, optimizer=name))
    losses = [optimizer.update(batch, SFT, Totals.of(batch))["loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_adafactor_keeps_a_row_and_a_column_where_adamw_keeps_two_matrices() -> None:
    sizes = {}
    for name in ("adamw", "adafactor"):
        weight = torch.nn.Parameter(torch.ones(40, 30))
        optimizer = build_optimizer(Optimization(steps=1, learning_rate=0.1, optimizer=name), [[weight]])
        weight.grad = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert not torch.equal(weight, torch.ones(40, 30))
        sizes[name] = sum(value.numel() for value in optimizer.state[weight].values() if value.dim())
    assert sizes == {"adamw": 2 * 40 * 30, "adafactor": 40 + 30}


def test_adamw_is_torchs_own_with_the_configured_betas(make_model) -> None:
    settings = Optimization(steps=1, learning_rate=0.1, beta1=0.8, beta2=0.9, weight_decay=0.3)
    [group] = build_optimizer(settings, [list(make_model().parameters())]).param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.3, 1e-8)


# ---- NEFTune


def sft_losses(model, samples, alpha: float, steps: int = 2, rank: int = 0) -> list[float]:
    strategy = DataParallel(World(rank=rank, size=1))
    optimizer = Learner(Network(model=model), strategy, METHOD, noise_alpha=alpha)
    return [optimizer.update(samples, SFT, Totals.of(samples))["loss"] for _ in range(steps)]


def test_noise_on_the_embeddings_is_seeded_and_zero_is_none(make_model, make_samples) -> None:
    samples = take(make_samples())
    plain, noisy, again, zero = (sft_losses(make_model(), samples, alpha) for alpha in (0.0, 5.0, 5.0, 0.0))
    assert noisy == again and plain == zero
    assert abs(noisy[0] - plain[0]) > 1e-3
    assert sft_losses(make_model(), samples, 5.0, rank=1) != noisy, "ranks draw noise of their own"


def test_noise_differs_between_updates_and_forests(make_model, make_samples) -> None:
    seen = []
    model = make_model()
    [tree] = [replace(s, tree=str(n)) for n, s in enumerate(take(make_samples(1))[:1])]
    twice = [tree, replace(tree, tree="again")]
    optimizer = learner(Network(model=model, max_tree_tokens=1), METHOD.model_copy(update={"steps": 100}), noise_alpha=5.0)
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    optimizer.update(twice, SFT, Totals.of(twice))
    first, second = seen
    assert first.shape == second.shape and not torch.equal(first, second)


def test_held_out_evaluation_has_no_noise_and_trains_nothing(make_model, make_samples) -> None:
    samples, model = take(make_samples()), make_model()
    clean = learner(Network(model=make_model())).evaluate(samples, SFT)
    optimizer = learner(Network(model=model), noise_alpha=5.0)
    before = snapshot(model.parameters())
    assert optimizer.evaluate(samples, SFT) == clean == learner(Network(model=model)).evaluate(samples, SFT)
    assert not moved(before, model.parameters()) and all(p.grad is None for p in model.parameters())
    assert clean["loss"] == pytest.approx(sft_losses(make_model(), samples, 0.0, steps=1)[0])
    assert clean["tokens"] == sum(len(s.completion_ids) for s in samples)
