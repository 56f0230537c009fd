"""Methods as rows of a table: configuration -> objective. The learner never learns a method's name.

Legend: N trained tokens, S samples, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mas_hpc.config_methods import (
    DPOConfig,
    GroupConfig,
    KLConfig,
    OfflineMethod,
    OnlineConfig,
    OnlineMethod,
    PPOConfig,
    ProcessRewardConfig,
    RewardModelConfig,
    SFTConfig,
)
from mas_hpc.data.token_tree import TokenTree
from mas_hpc.training.losses.aggregate import aggregate, segment_sum
from mas_hpc.training.losses.dpo import Completions, preference_loss
from mas_hpc.training.losses.kl import kl_estimate
from mas_hpc.training.losses.kto import kto_loss
from mas_hpc.training.losses.mismatch import mismatch_weight
from mas_hpc.training.losses.policy_gradient import Clip, policy_loss
from mas_hpc.training.losses.reward_model import binary_loss, bradley_terry_loss
from mas_hpc.training.losses.sft import nll_loss
from mas_hpc.training.losses.value import value_loss
from mas_hpc.training.network import Outputs
from mas_hpc.training.share import Totals

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises, and what it reads for it."""

    loss: Callable[[Outputs, TokenTree, Totals], tuple[Tensor, Metrics]]
    """One forest's part of the loss, divided by the global totals, and metrics with one value an item."""
    logprob: bool = True
    """Whether it reads log-probabilities; otherwise only scores."""
    behavior: bool = False
    """Whether it takes the engine's log-probabilities as the old ones, so that every trained token needs one."""
    pairs: bool = False
    """Whether it compares samples of a tree, which then must stay together."""


def offline_objective(config: OfflineMethod) -> Objective:
    """The objective of a method on data that exists."""
    if isinstance(config, SFTConfig):
        return Objective(loss=_sft)
    if isinstance(config, ProcessRewardConfig):
        return Objective(loss=_process, logprob=False)
    if isinstance(config, RewardModelConfig) and config.objective == "outcome":
        return Objective(loss=_outcome, logprob=False)
    if isinstance(config, RewardModelConfig):
        return Objective(loss=partial(_bradley_terry, center=config.center_coefficient), logprob=False, pairs=True)
    return Objective(loss=partial(_preference, config=config), pairs="kto" not in config.losses)


def policy_objective(
    config: OnlineMethod, *, kl_coefficient: float, max_length: int, policy: bool = True, value: bool = False
) -> Objective:
    """The policy's loss, the critic's, or their weighted sum on a shared model.

    `max_length` is the constant divisor of Dr. GRPO: a completion's limit in tokens, not the longest one of the batch.
    """

    def loss(outputs: Outputs, tree: TokenTree, totals: Totals) -> tuple[Tensor, Metrics]:
        parts: list[Tensor] = []
        metrics: Metrics = {}
        if policy:
            part, found = _policy(outputs, tree, totals, config=config, kl_coefficient=kl_coefficient, max_length=max_length)
            parts.append(part)
            metrics |= found
        if value:
            assert isinstance(config, PPOConfig)
            part, found = value_loss(
                outputs.score_N, tree.column_N["old_value"], tree.column_N["return"],
                num_tokens=totals.num_tokens, clip=config.value_clip or None,
            )  # fmt: skip
            parts.append(part * (config.value_coefficient if policy or config.critic == "shared" else 1.0))
            metrics |= found
        return sum(parts[1:], parts[0]), metrics

    return Objective(loss=loss, logprob=policy, behavior=policy and config.mismatch == "none")


def _policy(
    outputs: Outputs, tree: TokenTree, totals: Totals, *, config: OnlineConfig, kl_coefficient: float, max_length: int
) -> tuple[Tensor, Metrics]:  # fmt: skip
    logprob_N, sample_N = outputs.logprob_N, tree.sample_N
    old_N, weight_N, sampling = tree.behavior_logprob_N, None, dict[str, Tensor]()
    if config.mismatch != "none":
        old_N = tree.column_N.get("old_logprob", logprob_N.detach())
        weight_N, sampling = mismatch_weight(
            old_N, tree.behavior_logprob_N, sample_N, tree.num_samples, cap=config.mismatch_cap,
            level="token" if config.mismatch.startswith("token") else "sequence",
            action="truncate" if config.mismatch.endswith("truncate") else "mask",
        )  # fmt: skip
    ratio, mode = _FORMS[config.loss if isinstance(config, GroupConfig) else "ppo"]
    loss_N, metrics = policy_loss(
        logprob_N, old_N, tree.advantage_N, sample_N, tree.num_samples, ratio=ratio,
        clip=Clip(low=config.clip_low, high=config.clip_high, dual=config.dual_clip or None), weight_N=weight_N,
    )  # fmt: skip
    if "reference_logprob" in tree.column_N:
        loss_N, kl = _with_kl(loss_N, logprob_N, tree.column_N["reference_logprob"], config.kl, kl_coefficient)
        metrics |= kl
    loss = aggregate(
        loss_N, sample_N, tree.num_samples, mode=mode, num_tokens=totals.num_tokens, num_samples=totals.num_samples,
        max_length=max_length,
    )  # fmt: skip
    return loss, metrics | sampling


_FORMS: dict[str, tuple[Any, Any]] = {
    "ppo": ("token", "token_mean"),
    "grpo": ("token", "sequence_mean"),
    "dapo": ("token", "token_mean"),
    "dr_grpo": ("token", "constant"),
    "gspo": ("sequence", "sequence_mean"),
    "cispo": ("cispo", "token_mean"),
}
"""Form of the ratio and of the mean, by name of the loss."""


def _with_kl(
    loss_N: Tensor, logprob_N: Tensor, reference_N: Tensor, kl: KLConfig, coefficient: float
) -> tuple[Tensor, Metrics]:
    kl_N = kl_estimate(logprob_N, reference_N, estimator=kl.estimator, unbiased=kl.unbiased and kl.place == "loss")
    return loss_N + coefficient * kl_N if kl.place == "loss" else loss_N, {"kl": kl_N.detach()}


def _sft(outputs: Outputs, tree: TokenTree, totals: Totals) -> tuple[Tensor, Metrics]:
    return nll_loss(outputs.logprob_N, num_tokens=totals.num_tokens), {}


def _process(outputs: Outputs, tree: TokenTree, totals: Totals) -> tuple[Tensor, Metrics]:
    return binary_loss(outputs.score_N, tree.column_N["label"], num_items=totals.num_tokens)


def _outcome(outputs: Outputs, tree: TokenTree, totals: Totals) -> tuple[Tensor, Metrics]:
    return binary_loss(outputs.score_N, tree.label_S[tree.sample_N], num_items=totals.num_samples)


def _bradley_terry(outputs: Outputs, tree: TokenTree, totals: Totals, *, center: float) -> tuple[Tensor, Metrics]:
    chosen, rejected = _pairs(tree, segment_sum(outputs.score_N, tree.sample_N, tree.num_samples))
    margin_P, _ = _pairs(tree, tree.margin_S)
    return bradley_terry_loss(
        chosen, rejected, num_pairs=totals.num_samples // 2, margin_P=margin_P, center_coefficient=center
    )  # fmt: skip


def _pairs(tree: TokenTree, value_S: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected samples, which follow each other."""
    assert (tree.label_S[0::2] == 1).all() and (tree.label_S[1::2] == 0).all(), "pairs are chosen, rejected, chosen, ..."
    return value_S[0::2], value_S[1::2]


def _preference(outputs: Outputs, tree: TokenTree, totals: Totals, *, config: DPOConfig) -> tuple[Tensor, Metrics]:
    sums_S = segment_sum(outputs.logprob_N, tree.sample_N, tree.num_samples)
    reference_N = tree.column_N.get("reference_logprob", torch.zeros_like(outputs.logprob_N))
    reference_S = segment_sum(reference_N, tree.sample_N, tree.num_samples)
    if "kto" in config.losses:
        (kl,) = tree.column_N["kl"].unique()
        loss, metrics = kto_loss(
            sums_S - reference_S, tree.label_S == 1, kl, beta=config.beta, desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight, num_samples=totals.num_samples,
        )  # fmt: skip
        return config.losses["kto"] * loss, metrics
    length_S = segment_sum(torch.ones_like(reference_N), tree.sample_N, tree.num_samples)
    columns = [_pairs(tree, value_S) for value_S in (sums_S, reference_S, length_S)]
    chosen, rejected = (
        Completions(policy_P=policy_P, reference_P=reference_P, length_P=length_P)
        for policy_P, reference_P, length_P in zip(*columns, strict=True)
    )
    return preference_loss(
        chosen, rejected, losses=[(kind, weight) for kind, weight in config.losses.items() if kind != "kto"],
        beta=config.beta, label_smoothing=config.label_smoothing, gamma=config.gamma, num_pairs=totals.num_samples // 2,
    )  # fmt: skip
