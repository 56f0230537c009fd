"""The engines of the models that a rank serves, behind one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mas_hpc.config import RunConfig
from mas_hpc.distributed.tensor_layers import group_of
from mas_hpc.distributed.transport import Transport
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.rollout.engine import RolloutEngine
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.placement import Placement
from mas_hpc.rollout.router import RoutedEngine
from mas_hpc.rollout.sharded import ShardedEngine
from mas_hpc.rollout.tensor import TensorEngine

Make = Callable[[str], RolloutEngine]
"""The engine of the trained model for "", else of the policy's own model."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Which ranks serve which policies, and the messages between their engines.

    Example: Shards(placement=placement, transport=open_transport(world, timeout_s=300.0))
    """

    placement: Placement
    transport: Transport


def native_engine(config: RunConfig, model: Any, tokenizer: Any, bank: AdapterBank | None = None) -> RolloutEngine:
    """The engine that runs a model itself."""
    settings = config.rollout
    return NativeEngine(
        model, tokenizer, bank=bank, scope=config.adapters.scope, other_models=tuple(config.team.models),
        max_rows=settings.max_rows, kv_bytes=int(settings.kv_gib * 2**30), prefill_chunk=settings.prefill_chunk,
    )  # fmt: skip


def build_engine(
    config: RunConfig, model: Any, tokenizer: Any, other_models: Mapping[str, Any], shards: Shards | None,
    bank: AdapterBank | None = None,
) -> RolloutEngine:  # fmt: skip
    """Native engines of the models that this rank serves: whole, or with the ranks of its tensor group."""

    def make(policy: str) -> RolloutEngine:
        return native_engine(config, other_models[policy] if policy else model, tokenizer, None if policy else bank)

    engine, group = assemble_engine(config, list(other_models), shards, make), None if model is None else group_of(model)
    return TensorEngine(engine, group) if group else engine


def assemble_engine(config: RunConfig, own: Sequence[str], shards: Shards | None, make: Make) -> RolloutEngine:
    """An engine of the trained model, unless only other ranks serve it, and of every policy with its own model here."""
    is_here = shards is None or has_shared_model(config, shards.placement.policies_of(shards.transport.rank))
    main = make("") if is_here else None
    local = main if main is not None and not own else RoutedEngine(main, {policy: make(policy) for policy in own})
    if shards is None:
        return local
    return ShardedEngine(local, shards.placement, shards.transport, stall_s=config.rollout.stall_s)


def has_shared_model(config: RunConfig, policies: Sequence[str]) -> bool:
    """Whether some of these policies have no model of their own."""
    return any(policy not in config.team.models for policy in policies)
