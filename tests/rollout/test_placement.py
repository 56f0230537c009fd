"""Which ranks serve which policies, worked out by hand."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mas_hpc.config_team import AgentConfig, TeamConfig
from mas_hpc.errors import LaunchError
from mas_hpc.rollout.placement import Placement, ServedModel, place, placement_table, turns_by_agent


def model(name: str, *, size: int = 1, turns: int = 1, policies: tuple[str, ...] = ()) -> ServedModel:
    return ServedModel(name=name, policies=policies or (name,), num_parameters=size, turns=turns)


def test_colocated_ranks_serve_everything() -> None:
    found = place([model("a"), model("b")], ranks=3, mode="colocated")
    assert found == Placement(mode="colocated", owners={"a": (0, 1, 2), "b": (0, 1, 2)})
    assert found.policies_of(1) == ("a", "b")


def test_sharded_ranks_serve_one_model_each() -> None:
    found = place([model("a"), model("b")], ranks=2, mode="sharded")
    assert found == Placement(mode="sharded", owners={"a": (0,), "b": (1,)})
    assert found.policies_of(1) == ("b",)


def test_policies_of_one_model_stay_together() -> None:
    found = place([model("main", policies=("solver", "critic"), turns=2), model("judge")], ranks=3, mode="sharded")
    assert found.owners == {"solver": (0, 1), "critic": (0, 1), "judge": (2,)}


def test_ranks_are_shared_out_by_turns_times_size() -> None:
    models = [model("small", size=1, turns=3), model("large", size=7, turns=1)]
    assert place(models, ranks=10, mode="sharded").owners == {"small": (7, 8, 9), "large": (0, 1, 2, 3, 4, 5, 6)}


def test_a_model_with_little_to_do_has_a_rank_too() -> None:
    owners = place([model("idle", turns=0), model("busy", size=1000)], ranks=4, mode="sharded").owners
    assert owners == {"busy": (0, 1, 2), "idle": (3,)}


@pytest.mark.parametrize(
    ("names", "ranks", "expected"),
    [("a", 1, "colocated"), ("a", 4, "colocated"), ("ab", 1, "colocated"), ("ab", 2, "sharded"), ("abc", 2, "colocated")],
)
def test_auto_shards_where_several_models_have_a_rank_each(names: str, ranks: int, expected: str) -> None:
    assert place([model(name) for name in names], ranks=ranks, mode="auto").mode == expected


def test_groups_stay_on_one_host_where_they_fit() -> None:
    hosts = ["x"] * 4 + ["y"] * 3
    models = [model("a", size=3), model("b", size=2), model("c", size=2)]
    assert place(models, ranks=7, mode="sharded", hosts=hosts).owners == {"a": (4, 5, 6), "b": (0, 1), "c": (2, 3)}


def test_a_group_larger_than_a_host_takes_whole_hosts() -> None:
    hosts = ["x", "y", "x", "y", "x", "y"]
    owners = place([model("a", size=4), model("b", size=2)], ranks=6, mode="sharded", hosts=hosts).owners
    assert owners == {"a": (0, 1, 2, 4), "b": (3, 5)}


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=6), st.data())
def test_every_rank_has_one_model_and_every_model_a_rank(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    models = [model(f"m{i}", size=size, turns=turns) for i, (size, turns) in enumerate(sizes)]
    hosts = data.draw(st.lists(st.sampled_from("xyz"), min_size=max(2, len(models)), max_size=14))
    found = place(models, ranks=len(hosts), mode="sharded", hosts=hosts)
    assert all(found.owners[model.name] for model in models)
    assert sorted(rank for ranks in found.owners.values() for rank in ranks) == list(range(len(hosts)))


@pytest.mark.parametrize(
    ("names", "ranks", "message"),
    [
        (
            "ab",
            1,
            r"rollout.placement=sharded: 2 models \(a, b\) on 1 rank, which leaves .*\['b'\].* at least 2 ranks: start more",
        ),
        (
            "abc",
            2,
            r"rollout.placement=sharded: 3 models \(a, b, c\) on 2 ranks, .*\['c'\] without one; expected at least 3 ranks",
        ),
        (
            "a",
            1,
            r"rollout.placement=sharded: 1 model \(a\) on 1 rank, nothing to share out; .*or set rollout.placement=colocated",
        ),
    ],
)
def test_sharding_over_too_few_ranks_says_what_to_do(names: str, ranks: int, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        place([model(name) for name in names], ranks=ranks, mode="sharded")


TEAMS = [
    TeamConfig(),
    TeamConfig(rounds=3),
    TeamConfig(topology="single"),
    TeamConfig(topology="self_consistency", rounds=5),
    TeamConfig(topology="best_of_n", rounds=4, agents=(AgentConfig(name="s"), AgentConfig(name="v", role="verifier"))),
    TeamConfig(topology="debate", rounds=2, agents=tuple(AgentConfig(name=n, role="debater") for n in "abc")),
    TeamConfig(
        topology="debate", rounds=2,
        agents=tuple(AgentConfig(name=name, role=role) for name, role in (("a", "debater"), ("b", "debater"), ("j", "judge"))),
    ),
    TeamConfig(
        topology="mixture", rounds=3, agents=(AgentConfig(name="p", role="proposer"), AgentConfig(name="g", role="aggregator"))
    ),
]  # fmt: skip


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: f"{team.topology}-{team.rounds}")
def test_turns_of_agents_sum_to_the_longest_episode(team: TeamConfig) -> None:
    assert sum(turns_by_agent(team).values()) == team.max_speakers


def test_those_who_go_again_have_more_turns() -> None:
    assert turns_by_agent(TeamConfig(rounds=3)) == {"solver": 1, "critic": 1, "reviser": 3, "verifier": 3}


def test_the_table_shows_each_model_with_its_ranks_by_host() -> None:
    models = [model("main", policies=("solver", "critic"), size=3_000_000), model("judge", size=1_000_000)]
    hosts = ["x0", "x0", "x1", "x1"]
    console = Console(file=io.StringIO(), width=120)
    console.print(placement_table(place(models, ranks=4, mode="sharded", hosts=hosts), models, hosts))
    text = console.file.getvalue()
    assert "placement: sharded" in text
    assert "solver, critic" in text and "x0: 0-1; x1: 2" in text and "75%" in text
    assert "x1: 3" in text and "1,000,000" in text
