"""Every method: its loss, metrics and gradients are those of the batch, however it is cut (issue 3, golden G1-G7, G14)."""

from __future__ import annotations

from dataclasses import replace
from math import log, nan

import pytest
import torch

from mas_hpc.config_methods import (
    DPOConfig,
    GRPOConfig,
    KLConfig,
    Optimization,
    PPOConfig,
    ProcessRewardConfig,
    RewardModelConfig,
    SFTConfig,
)
from mas_hpc.data.token_tree import pack
from mas_hpc.distributed.world import World
from mas_hpc.errors import DataError
from mas_hpc.models.heads import ScalarHead
from mas_hpc.training.learner import Learner, reduce
from mas_hpc.training.losses.aggregate import segment_mean
from mas_hpc.training.methods import Objective, offline_objective, policy_objective
from mas_hpc.training.network import Network, Outputs
from mas_hpc.training.online import Minibatch, Online, fit_online
from mas_hpc.training.share import Totals, share
from mas_hpc.training.timing import StepTimer
from mas_hpc.types import Sample

OPTIMIZATION = Optimization(steps=10, learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)
MISMATCHES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
KLS = {
    "none": KLConfig(),
    "k1_unbiased": KLConfig(coefficient=0.1, estimator="k1"),
    "k2": KLConfig(coefficient=0.1, estimator="k2", unbiased=False),
    "k3": KLConfig(coefficient=0.1, estimator="k3", unbiased=False),
    "k3_unbiased": KLConfig(coefficient=0.1, estimator="k3"),
}
PAIRED = ("sigmoid", "hinge", "ipo_sum", "ipo_mean", "robust", "simpo", "orpo", "sft")


def online(config: GRPOConfig | PPOConfig, **parts: bool) -> Objective:
    return policy_objective(config, kl_coefficient=config.kl.coefficient, max_length=10, **parts)


def objectives() -> dict[str, Objective]:
    found = {
        "sft": offline_objective(SFTConfig()),
        "rm_bradley_terry": offline_objective(RewardModelConfig()),
        "rm_outcome": offline_objective(RewardModelConfig(objective="outcome")),
        "prm": offline_objective(ProcessRewardConfig()),
        "kto": offline_objective(DPOConfig(losses={"kto": 1.0}, undesirable_weight=1.5)),
        "dpo_weighted": offline_objective(DPOConfig(losses={"sigmoid": 1.0, "sft": 0.5, "orpo": 0.2}, label_smoothing=0.1)),
        "ppo_shared": online(PPOConfig(critic="shared"), value=True),
        "ppo_policy": online(PPOConfig(dual_clip=3.0)),
        "ppo_critic": online(PPOConfig(), policy=False, value=True),
    }
    for kind in PAIRED:
        found[f"dpo_{kind}"] = offline_objective(DPOConfig(losses={kind: 1.0}, beta=0.3, label_smoothing=0.1))
    # A Latin square: each loss meets each KL and each mismatch, each KL each mismatch.
    for row, loss in enumerate(("grpo", "dr_grpo", "dapo", "gspo", "cispo")):
        for column, (name, kl) in enumerate(KLS.items()):
            mismatch = MISMATCHES[(row + column) % 5]
            config = GRPOConfig(loss=loss, kl=kl, mismatch=mismatch, clip_high=0.28)
            found[f"{loss}-{name}-{mismatch}"] = online(config)
    return found


OBJECTIVES = objectives()


def readable(name: str, samples: list[Sample]) -> list[Sample]:
    """Only what the method reads, as its phase would make the samples."""
    if name.startswith("rm_"):
        samples = [replace(s, loss_mask=(*(False,) * (len(s.completion_ids) - 1), True)) for s in samples]
    if name == "prm":
        samples = [replace(s, loss_mask=tuple(i % 2 == 0 for i in range(len(s.completion_ids)))) for s in samples]
    if name.endswith("-none") or "-none-" in name:
        unread = {"old_logprob"} if name.endswith("-none") else set()
        unread |= {"reference_logprob"} if "-none-" in name else set()
        samples = [replace(s, columns={k: v for k, v in s.columns.items() if k not in unread}) for s in samples]
    return samples


@pytest.fixture
def step(make_model, lone_rank):
    """step(samples, objective, ...) takes one step on fresh weights: metrics, gradients and what would be gathered."""

    def take(samples, objective, *, totals=None, budget=10_000, rank=0, size=1):
        model, head = make_model(), ScalarHead(16, seed=3).double()
        strategy = lone_rank(rank, size)
        learner = Learner(Network(model=model, head=head, max_tree_tokens=budget), strategy, OPTIMIZATION)
        metrics = learner.update(samples, objective, totals or Totals.of(samples))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.trained]
        return metrics, gradients, strategy.gathered[0]

    return take


def close(got: dict[str, float], expected: dict[str, float]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_g5_micro_batches_and_ranks_do_not_change_loss_metrics_or_gradients(step, make_samples, name: str) -> None:
    samples, objective = readable(name, make_samples()), OBJECTIVES[name]
    metrics, gradients, _ = step(samples, objective)
    assert metrics["loss"] and sum(float(g.abs().sum()) for g in gradients) > 1e-3, "the test would be vacuous"
    for budget in (40, 1):
        cut, cut_gradients, _ = step(samples, objective, budget=budget)
        close(cut, metrics)
        torch.testing.assert_close(cut_gradients, gradients, rtol=1e-8, atol=1e-12)
    parts = [step(samples, objective, rank=rank, size=2) for rank in range(2)]
    del metrics["grad_norm"], metrics["learning_rate"]
    joined = reduce([sums for _, _, sums in parts])
    StepTimer().collect(joined)  # takes what was measured, such as memory
    close(joined, metrics)
    summed = [a + b for a, b in zip(parts[0][1], parts[1][1], strict=True)]
    torch.testing.assert_close(summed, gradients, rtol=1e-8, atol=1e-12)


def of_lengths(*sizes: int, advantages: tuple[float, ...] = ()) -> list[Sample]:
    """One tree a sample."""
    return [
        Sample(
            id=str(n), tree=str(n), agent="a", policy="shared", prompt_ids=(1, n), prompt_spans=(("", 2),),
            completion_ids=tuple(range(3, 3 + size)), behavior_logprobs=(-3.0,) * size,
            advantage=advantages[n] if advantages else 1.0,
        )
        for n, size in enumerate(sizes)
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [1, 10_000])
def test_g1_the_token_mean_is_global(step, budget: int) -> None:
    def loss(outputs: Outputs, tree, totals: Totals):
        length_N = torch.bincount(tree.sample_N)[tree.sample_N]
        value_N = torch.where(length_N == 2, 1.0, 3.0)
        return (value_N + 0 * outputs.logprob_N).sum() / totals.num_tokens, {"value": value_N}

    metrics, _, _ = step(of_lengths(2, 6), Objective(loss=loss), budget=budget)
    assert metrics["loss"] == metrics["value"] == 2.5  # a mean of means would be 2.0


def test_g2_a_loss_of_ones_own_is_scaled_exactly_once(step, make_samples) -> None:
    def loss(outputs: Outputs, tree, totals: Totals):
        mean_S = segment_mean(outputs.logprob_N.square(), tree.sample_N, tree.num_samples)
        return mean_S.sum() / totals.num_samples, {}

    samples = make_samples()
    whole, cut = (step(samples, Objective(loss=loss), budget=budget) for budget in (10_000, 1))
    assert cut[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-12)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-9, atol=1e-12)


def test_g3_a_minibatch_is_divided_by_its_own_counts(step) -> None:
    samples, losses = of_lengths(2, 6, 1, 3), []
    objective = OBJECTIVES["sft"]
    minibatches = [Minibatch(samples=part, totals=Totals.of(part)) for part in (samples[:2], samples[2:])]

    def learn(number: int, minibatch: Minibatch):
        losses.append(step(minibatch.samples, objective, totals=minibatch.totals)[0]["loss"])
        return {"loss": losses[-1]}

    logged = []
    loop = Online(
        collect=lambda number: None, credit=lambda collected: (minibatches, {"reward": 1.0}), learn=learn,
        push=lambda version: None, log=lambda number, metrics: logged.append(metrics), look=lambda number: None,
        keep=lambda number: None,
    )  # fmt: skip
    fit_online(loop, range(1))
    assert losses == [step(part, objective)[0]["loss"] for part in (samples[:2], samples[2:])]
    assert logged == [{"reward": 1.0, "loss": pytest.approx(sum(losses) / 2)}]
    whole = step(samples, objective)[0]["loss"]
    assert whole == pytest.approx((8 * losses[0] + 4 * losses[1]) / 12)


def test_g3_samples_without_gradient_may_be_left_out_but_count(step) -> None:
    samples = of_lengths(2, 6, 3, advantages=(1.0, 0.0, -2.0))
    for loss in ("grpo", "dapo", "dr_grpo", "gspo", "cispo"):
        objective = online(GRPOConfig(loss=loss))
        _, gradients, _ = step(samples, objective)
        _, fewer, _ = step([samples[0], samples[2]], objective, totals=Totals.of(samples))
        torch.testing.assert_close(fewer, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_g4_the_mean_over_sequences_is_global(step, loss: str, size: int) -> None:
    samples = of_lengths(1, 5, 2, 2, advantages=(1.0, -3.0, -1.0, -1.0))
    objective = online(GRPOConfig(loss=loss, mismatch="token_truncate"))
    samples = with_own_behavior(step, samples)
    parts = [step(samples, objective, rank=rank, size=size)[2] for rank in range(size)]
    assert all(part["ratio/mean"][1] for part in parts), "each rank has work"
    assert reduce(parts)["loss"] == pytest.approx((-1 + 3 + 1 + 1) / 4, abs=1e-6)


@pytest.mark.parametrize(("loss", "expected"), [("grpo", 0.0), ("dapo", 0.5), ("dr_grpo", 0.2)])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_g6_aggregation_modes(step, loss: str, expected: float, budget: int) -> None:
    samples = with_own_behavior(step, of_lengths(2, 6, advantages=(1.0, -1.0)))
    objective = online(GRPOConfig(loss=loss, mismatch="token_truncate"))
    assert step(samples, objective, budget=budget)[0]["loss"] == pytest.approx(expected, abs=1e-6)


def with_own_behavior(step, samples: list[Sample]) -> list[Sample]:
    """With the trainer's own log-probs as the engine's."""
    found: dict[str, tuple[float, ...]] = {}

    def read(outputs: Outputs, tree, totals: Totals):
        for number, sample in enumerate(samples):
            found[sample.id] = tuple(outputs.logprob_N[tree.sample_N == number].tolist())
        return outputs.logprob_N.sum(), {}

    step(samples, Objective(loss=read))
    return [replace(sample, behavior_logprobs=found[sample.id]) for sample in samples]


def test_g7_metrics_are_global_means_and_extremes(step) -> None:
    def loss(outputs: Outputs, tree, totals: Totals):
        value_N = tree.target_N.double()
        return 0 * outputs.logprob_N.sum(), {"x": value_N, "x/max": value_N, "x/min": value_N, "rare": value_N[value_N > 6]}

    samples = of_lengths(2, 6)  # targets 3, 4 and 3 to 8: one tree a rank
    assert [len(share(samples, rank, 2, hidden_size=16)) for rank in range(2)] == [1, 1]
    expected = {"x": (3 + 4 + 3 + 4 + 5 + 6 + 7 + 8) / 8, "x/max": 8.0, "x/min": 3.0, "rare": 7.5, "tokens": 8.0, "loss": 0.0}
    for size in (1, 2):
        found = reduce([step(samples, Objective(loss=loss), rank=rank, size=size)[2] for rank in range(size)])
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_g14_on_policy_the_ratio_is_one_and_the_loss_is_the_kl(step, loss: str) -> None:
    samples = with_own_behavior(step, of_lengths(3, 3, advantages=(1.0, -1.0)))
    reference = [replace(s, columns={"reference_logprob": tuple(v - 1.0 for v in s.behavior_logprobs)}) for s in samples]
    config = GRPOConfig(loss=loss, mismatch="sequence_mask", kl=KLConfig(coefficient=0.5, estimator="k3"))
    metrics, gradients, _ = step(reference, online(config))
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1.0
    assert metrics["clip_ratio/region_mean"] == metrics["approx_kl"] == 0.0
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0.367879, abs=1e-5)
    # cispo's value is that of -A log pi: only its gradient is a policy gradient's
    tokens = 2 * 3 / (2 * 10) if loss == "dr_grpo" else 1.0
    if loss != "cispo":
        assert metrics["loss"] == pytest.approx(0.5 * 0.367879 * tokens, abs=1e-5)
    assert sum(float(g.abs().sum()) for g in gradients) > 0.1
    same = [replace(s, columns={"reference_logprob": s.behavior_logprobs}) for s in samples]
    metrics, _, _ = step(same, online(config))
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)


def test_g14_the_first_of_several_updates_is_on_policy_too(make_model, make_samples) -> None:
    network = Network(model=make_model())
    samples = network.annotate(make_samples(), World(), column="old_logprob", read="logprob")
    objective = online(GRPOConfig(mismatch="token_truncate"))
    for part, tree in network.forests(samples):
        with network.run(tree) as outputs:
            _, metrics = objective.loss(outputs, tree, Totals.of(part))
        torch.testing.assert_close(
            metrics["ratio/mean"], torch.ones_like(metrics["ratio/mean"]), rtol=0, atol=1e-6
        )  # stored as float32
        assert not metrics["clip_ratio/region_mean"].any()


def test_a_sample_without_engine_logprobs_is_refused_where_they_are_the_old_ones(step, make_samples) -> None:
    samples = make_samples(2)
    samples[1] = replace(samples[1], behavior_logprobs=(nan,) * len(samples[1].completion_ids))
    samples[4] = replace(samples[4], behavior_logprobs=())
    with pytest.raises(DataError, match=r"2 of 8 samples, such as \['0/1', '1/0'\].*mismatch=token_truncate"):
        step(samples, online(GRPOConfig()))
    corrected, _, _ = step(samples, online(GRPOConfig(mismatch="token_truncate")))
    critic, _, _ = step(samples, online(PPOConfig(), policy=False, value=True))
    assert corrected["loss"] == corrected["loss"] and critic["loss"] == critic["loss"], "neither is nan"


def test_g32_a_token_without_engine_logprob_has_the_weight_one(step) -> None:
    samples = [replace(s, behavior_logprobs=()) for s in of_lengths(2, 6, advantages=(1.0, -1.0))]
    metrics, _, _ = step(samples, online(GRPOConfig(mismatch="token_mask")))
    assert metrics["sampling/importance_sampling_ratio/mean"] == 1.0
    assert "sampling/sampling_logp_difference/mean" not in metrics


def test_g33_g34_equal_rewards_and_a_policy_at_its_reference_cost_log_two(step, make_samples) -> None:
    samples = with_own_behavior(step, make_samples(2))
    same = [replace(s, columns={"reference_logprob": s.behavior_logprobs}, margin=0.0) for s in samples]
    metrics, _, _ = step(same, offline_objective(DPOConfig()))
    assert metrics["loss"] == pytest.approx(log(2), abs=1e-6)
    twins = [replace(s, completion_ids=(5,), columns={}, behavior_logprobs=()) for s in same]
    metrics, _, _ = step(twins, offline_objective(RewardModelConfig(center_coefficient=0.0)))
    assert metrics["loss"] == pytest.approx(log(2)) and metrics["accuracy"] == 0.0


def test_a_shared_critic_adds_its_weighted_loss(step, make_samples) -> None:
    samples, config = make_samples(), PPOConfig(critic="shared", value_coefficient=0.25)
    policy, value = step(samples, online(config))[0], step(samples, online(config, policy=False, value=True))[0]
    both = step(samples, online(config, value=True))[0]
    assert both["loss"] == pytest.approx(policy["loss"] + value["loss"])
    alone = step(samples, online(PPOConfig(), policy=False, value=True))[0]
    assert value["loss"] == pytest.approx(0.25 * alone["loss"]), "a separate critic's loss has no weight"


def test_pairs_must_alternate(make_samples, make_model) -> None:
    network = Network(model=make_model())
    tree = pack(make_samples(1)[::-1], adapters={}, scope="sequence")
    with pytest.raises(AssertionError, match="chosen, rejected"), network.run(tree) as outputs:
        OBJECTIVES["dpo_sigmoid"].loss(outputs, tree, Totals(num_tokens=1, num_samples=4))


@pytest.mark.parametrize(
    ("loss", "advantage", "expected", "gradient"),
    [
        # log-ratios .1, -.2, .3: exp(mean) = 1.068939 (golden G30), inside the clip
        ("gspo", 1.0, -1.068939, [-1.068939 / 3] * 3),
        # each token alone; 1.349859 is cut to 1.2 and has no gradient
        ("dapo", 1.0, -(1.105171 + 0.818731 + 1.2) / 3, [-1.105171 / 3, -0.818731 / 3, 0.0]),
        # the cut ratio as a weight of log pi, at -0.9, -1.2 and -0.7
        ("cispo", 1.0, -(1.105171 * -0.9 + 0.818731 * -1.2 + 1.2 * -0.7) / 3, [-1.105171 / 3, -0.818731 / 3, -1.2 / 3]),
    ],
)
def test_g30_g31_each_loss_has_its_own_ratio(loss: str, advantage: float, expected: float, gradient: list[float]) -> None:
    sample = Sample(
        id="s", tree="s", agent="a", policy="p", prompt_ids=(1,), prompt_spans=(("", 1),), completion_ids=(2, 3, 4),
        behavior_logprobs=(-1.0,) * 3, advantage=advantage,
    )  # fmt: skip
    logprob_N = torch.tensor([-0.9, -1.2, -0.7], requires_grad=True)
    outputs = Outputs(logprob_N=logprob_N, entropy_N=torch.empty(0), score_N=torch.empty(0))
    tree = pack([sample], adapters={}, scope="sequence")
    value, _ = online(GRPOConfig(loss=loss)).loss(outputs, tree, Totals.of([sample]))
    value.backward()
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert logprob_N.grad.tolist() == pytest.approx(gradient, abs=1e-5)


def test_the_weight_of_kto_multiplies_its_loss(step, make_samples) -> None:
    samples = [
        replace(s, label=float(n % 2), columns={"kl": (0.0,) * len(s.completion_ids)}) for n, s in enumerate(make_samples(2))
    ]
    one, three = (step(samples, offline_objective(DPOConfig(losses={"kto": w})))[0]["loss"] for w in (1.0, 3.0))
    assert three == pytest.approx(3 * one)
