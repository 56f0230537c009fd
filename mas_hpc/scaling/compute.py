"""Floating-point operations of training passes, as mas_hpc.training.flops counts them, without a model."""

from __future__ import annotations

from dataclasses import dataclass

from mas_hpc.config import RunConfig
from mas_hpc.scaling.load import Pass
from mas_hpc.scaling.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Which weights have gradients, and what is computed twice.

    Example: Trained(body=106_000_000, head=28_000_000, parameters=134_515_008, checkpointing=False)
    """

    body: int
    """Weights with gradients that a token meets, but for the head."""
    head: int
    """Of the LM head: all or none."""
    parameters: int
    """All that the optimizer keeps states of."""
    checkpointing: bool
    """Activations are computed again in the backward pass."""


def trained_of(config: RunConfig, shape: ModelShape) -> Trained:
    """The whole model, or an adapter for each policy."""
    if config.adapters.policies == "shared":
        return Trained(
            body=shape.body, head=shape.head, parameters=shape.parameters,
            checkpointing=config.model.activation_checkpointing,
        )  # fmt: skip
    adapter = shape.adapter_parameters(config.adapters.rank, config.adapters.target_modules)
    num_policies = len({agent.policy or agent.name for agent in config.team.agents} - set(config.team.models))
    return Trained(body=adapter, head=0, parameters=adapter * num_policies, checkpointing=config.model.activation_checkpointing)


def forward_flops(shape: ModelShape, work: Pass) -> float:
    """Of a pass forward."""
    return 2 * shape.body * work.tokens + 2 * shape.head * work.predictors + 4 * shape.attention * work.pairs


def training_flops(shape: ModelShape, work: Pass, trained: Trained) -> float:
    """Of a pass forward and backward; with checkpointing, forward once more."""
    forward = forward_flops(shape, work)
    again = forward if trained.checkpointing else 0.0
    weights = 2 * trained.body * work.tokens + 2 * trained.head * work.predictors
    return 2 * forward + again + weights + 4 * shape.attention * work.pairs
