"""Which ranks serve which policies. Pure functions; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rich.table import Table

from mas_hpc.config_team import TeamConfig
from mas_hpc.errors import LaunchError

Mode = Literal["auto", "colocated", "sharded"]
KEY = "rollout.placement"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A full model, and the policies that it serves: one, or those of all its adapters.

    Example: ServedModel(name="smollm2", policies=("solver", "critic"), num_parameters=134_515_008, turns=2)
    """

    name: str
    policies: tuple[str, ...]
    num_parameters: int
    turns: int
    """Turns of an episode at most that its policies speak."""

    @property
    def load(self) -> int:
        """Its share of the work, in turns x parameters."""
        return max(1, self.turns * self.num_parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The ranks that own each policy, in ascending order; every rank owns at least one.

    Example: Placement(mode="sharded", owners={"solver": (0, 1), "judge": (2,)}).policies_of(2) == ("judge",)
    """

    mode: Literal["colocated", "sharded"]
    owners: Mapping[str, tuple[int, ...]]

    def policies_of(self, rank: int) -> tuple[str, ...]:
        """What `rank` serves."""
        return tuple(policy for policy, ranks in self.owners.items() if rank in ranks)


def place(models: Sequence[ServedModel], *, ranks: int, mode: Mode, hosts: Sequence[str] = ()) -> Placement:
    """Give every model its ranks; `hosts` is the host name of each rank, empty when there is one host.

    colocated: every rank has every model. sharded: every rank has one model, and a model has the ranks that its load is worth,
    at least one, side by side on one host where they fit. auto: sharded where several models have a rank each, else colocated.
    Raises LaunchError for `sharded` on one rank, or on fewer ranks than models.
    """
    policies = [policy for model in models for policy in model.policies]
    assert models and ranks > 0 and len(set(policies)) == len(policies), models
    assert not hosts or len(hosts) == ranks, hosts
    if mode == "sharded":
        _check_sharded(models, ranks)
    if mode == "colocated" or (mode == "auto" and not 1 < len(models) <= ranks):
        return Placement(mode="colocated", owners=dict.fromkeys(policies, tuple(range(ranks))))
    groups = _side_by_side(_num_ranks(models, ranks), hosts or [""] * ranks)
    owners = {policy: group for model, group in zip(models, groups, strict=True) for policy in model.policies}
    return Placement(mode="sharded", owners=owners)


def turns_by_agent(team: TeamConfig) -> dict[str, int]:
    """Most turns of an episode that each agent speaks; they sum to team.max_speakers."""
    names = [agent.name for agent in team.speaking]
    if team.topology in ("pipeline", "best_of_n"):
        again = names[len(names) - team.looped :]
    else:
        again = names[: len(names) - team.has_closing]
    return {name: team.rounds if name in again else 1 for name in names}


def placement_table(placement: Placement, models: Sequence[ServedModel], hosts: Sequence[str] = ()) -> Table:
    """One row a model: what it serves, its share of the work, and where."""
    table = Table(title=f"placement: {placement.mode}", title_justify="left")
    for column in ("model", "policies"):
        table.add_column(column)
    for column in ("parameters", "work"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("ranks")
    total = sum(model.load for model in models)
    for model in models:
        group = placement.owners[model.policies[0]]
        table.add_row(
            model.name, ", ".join(model.policies), f"{model.num_parameters:,}", f"{model.load / total:.0%}",
            _where(group, hosts),
        )  # fmt: skip
    return table


def _check_sharded(models: Sequence[ServedModel], ranks: int) -> None:
    needed = max(2, len(models))
    if ranks >= needed:
        return
    without = [policy for model in models[ranks:] for policy in model.policies]
    names = ", ".join(model.name for model in models)
    found = f"{len(models)} model{'s' * (len(models) > 1)} ({names}) on {ranks} rank{'s' * (ranks > 1)}"
    raise LaunchError(
        f"{KEY}=sharded: {found}, {f'which leaves the policies {without} without one' if without else 'nothing to share out'}; "
        f"expected at least {needed} ranks: start more (torchrun --nproc_per_node {needed} ..., mpiexec -n {needed} ...), "
        f"or set {KEY}=colocated"
    )


def _num_ranks(models: Sequence[ServedModel], ranks: int) -> list[int]:
    """Ranks of each model: each further one goes where a rank has most to do, so the busiest has as little as can be."""
    counts = [1] * len(models)
    for _ in range(ranks - len(models)):
        busiest = max(range(len(models)), key=lambda i: models[i].load / counts[i])
        counts[busiest] += 1
    return counts


def _side_by_side(counts: Sequence[int], hosts: Sequence[str]) -> list[tuple[int, ...]]:
    """Ranks of each group, the largest group first: in the fullest host with room for it, else over those with most room."""
    free: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        free.setdefault(host, []).append(rank)
    groups: dict[int, list[int]] = {}
    for group in sorted(range(len(counts)), key=lambda i: -counts[i]):
        groups[group] = []
        while (missing := counts[group] - len(groups[group])) > 0:
            fits = [room for room in free.values() if len(room) >= missing]
            room = min(fits, key=len) if fits else max(free.values(), key=len)
            groups[group] += room[:missing]
            del room[:missing]
    return [tuple(sorted(groups[group])) for group in range(len(counts))]


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks as ranges, by host where there are several."""
    if len(set(hosts)) < 2:
        return _ranges(ranks)
    names = dict.fromkeys(hosts[rank] for rank in ranks)
    return "; ".join(f"{name}: {_ranges([rank for rank in ranks if hosts[rank] == name])}" for name in names)


def _ranges(ranks: Sequence[int]) -> str:
    starts = [ranks[0], *(after for before, after in pairwise(ranks) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ranks) if after != before + 1), ranks[-1]]
    return ", ".join(f"{start}-{end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True))
