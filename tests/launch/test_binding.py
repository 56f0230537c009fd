"""Bind lists: what is good is found good, and each planted fault is found by its name."""

from __future__ import annotations

import itertools

import pytest

from mas_hpc.launch.binding import binding_table, check_binding, places
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.site import load_site, parse_cores
from tests.launch.golden_jobs import Case, plan_of

GOOD = ["4-7", "9-12", "14-17", "19-22", "24-27", "29-32", "56-59", "61-64", "66-69", "71-74", "76-79", "81-84"]


def bound(cores: list[str], **changes: object) -> JobPlan:
    """One node of Aurora with these lists."""
    plan = plan_of(Case(nodes=1, ppn=12, tp=1, disaggregated=False))
    group = plan.groups[0].model_copy(update={"cores": tuple(cores), "ranks_per_node": len(cores)})
    return plan.model_copy(update={"groups": (group,), "ranks_per_node": len(cores), **changes})


def with_workers(cores: list[str], workers: str) -> JobPlan:
    plan = bound(cores)
    environment = plan.groups[0].environment
    environment = environment.model_copy(update={"set": {**environment.set, "CCL_WORKER_AFFINITY": workers}})
    return plan.model_copy(update={"groups": (plan.groups[0].model_copy(update={"environment": environment}),)})


def found(plan: JobPlan) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.verdict, finding.evidence) for finding in check_binding(plan)}


def changed(**lists: str) -> list[str]:
    """GOOD with other lists: r5="..." is local rank 5's."""
    return [lists.get(f"r{rank}", text) for rank, text in enumerate(GOOD)]


@pytest.mark.parametrize("ppn", [binding.ranks_per_node for binding in load_site("aurora").bindings])
def test_the_lists_that_are_shipped_are_good(ppn: int) -> None:
    verdicts = {
        name: verdict for name, (verdict, _) in found(plan_of(Case(nodes=1, ppn=ppn, tp=1, disaggregated=False))).items()
    }
    assert verdicts.pop("tiles") == ("ok" if ppn == 12 else "warning")  # a rank a card leaves a tile of it idle
    assert set(verdicts.values()) <= {"ok", "skipped"}


def test_each_rank_has_its_tile_its_socket_and_a_card_of_the_network() -> None:
    ranks = list(places(plan_of(Case(nodes=1, ppn=12, tp=1, disaggregated=False))))
    assert [place.tiles for place in ranks] == [(tile,) for tile in range(12)]
    assert [place.nic for place in ranks] == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5]
    cards = list(places(plan_of(Case(nodes=1, ppn=6, tp=2, disaggregated=False))))
    assert [place.tiles for place in cards] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert [place.nic for place in cards] == [0, 1, 2, 4, 5, 6]


def test_ranks_of_the_second_group_go_on_where_the_first_ends() -> None:
    plan = plan_of(Case(nodes=16, ppn=12, tp=1, disaggregated=True))
    second = [place for place in places(plan) if place.role == "native"]
    assert [(place.rank, place.node, place.local_rank) for place in second[:2]] == [(144, 12, 0), (145, 12, 1)]
    assert binding_table(plan).row_count == 24


@pytest.mark.parametrize(
    ("cores", "name", "evidence"),
    [
        (changed(r0="0-3"), "reserved cores", "local ranks [0] have cores [0]"),
        (changed(r0="4-7,104"), "reserved cores", "local ranks [0] have cores [104]"),
        (changed(r11="205-208"), "reserved cores", "local ranks [11] have cores [208]: reserved, or beyond 207"),
        (changed(r1="7-10"), "overlap", "cores 7 belong to more than one rank"),
        (changed(r1="9-12,108"), "overlap", "cores 4 belong to more than one rank"),  # 108 is the other thread of 4
        (changed(r5="49-51,53-57"), "sockets", "local rank 5 has 49-51,53-57"),  # as --cpu-bind=depth --depth=8 does
        (changed(r5="85-88"), "tiles", "local ranks [5] have cores of one socket and tiles of another"),
        (changed(r4="42-43"), "CCL workers", "ranks or the system have [42, 43]"),
    ],
)
def test_a_rank_where_none_may_be_is_an_error_that_names_it(cores: list[str], name: str, evidence: str) -> None:
    verdict, said = found(bound(cores))[name]
    assert verdict == "error"
    assert evidence in said


def test_copper_keeps_its_cores() -> None:
    verdict, said = found(bound(changed(r5="48-49")))["service cores"]
    assert (verdict, said) == ("warning", "cores 48,49 are those of services such as Copper")


def test_lists_that_begin_on_cores_of_one_nic_are_told() -> None:
    """ALCF's own two lists: every rank begins at c mod 4 = 1, or = 0."""
    eights = ["1-8", "9-16", "17-24", "25-32", "33-40", "41-48", "53-60", "61-68", "69-76", "77-84", "85-92", "93-100"]
    fours = ["4-7", "8-11", "12-15", "16-19", "20-23", "24-27", "56-59", "60-63", "64-67", "68-71", "72-75", "76-79"]
    for lists in (eights, fours):
        verdict, said = found(bound(lists))["NICs"]
        assert verdict == "warning" and said.startswith("first cores lead 6 of 12 ranks to one NIC, of 8")


def test_workers_of_the_other_socket_are_an_error() -> None:
    verdict, said = found(with_workers(GOOD, "94,43,44,45,46,47,42,95,96,97,98,99"))["CCL workers"]
    assert verdict == "error" and "local ranks [0, 6] are on the other socket" in said
    eights = ["1-8", "9-16", "17-24", "25-32", "33-40", "41-51", "53-60", "61-68", "69-76", "77-84", "85-92", "93-103"]
    verdict, said = found(with_workers(eights, ""))["CCL workers"]
    assert (verdict, said) == ("warning", "0 cores of a node are left for oneCCL's 12 workers")


def test_tiles_that_share_layers_are_of_one_card() -> None:
    assert found(bound(GOOD, tensor_parallel=2))["tensor parallel"] == ("ok", "groups of 2 tiles, each on one card")
    verdict, said = found(bound(GOOD, tensor_parallel=4))["tensor parallel"]
    assert (verdict, said) == ("warning", "tiles 0,1,2,3 share each layer over 15 GB/s between cards")
    assert found(bound(GOOD, tensor_parallel=5))["tensor parallel"][0] == "error"
    a_rank_a_card = plan_of(Case(nodes=1, ppn=6, tp=2, disaggregated=False))
    assert found(a_rank_a_card)["tensor parallel"] == ("warning", "tiles 0,2 share each layer over 15 GB/s between cards")


def test_more_ranks_than_tiles_is_an_error() -> None:
    assert found(bound([*GOOD, "86-89"]))["tiles"] == ("error", "13 ranks a node, and 12 of xpu")


def test_no_rank_is_bound_where_a_site_has_no_lists() -> None:
    plan = bound(GOOD).model_copy(update={"site": load_site("laptop")})
    plan = plan.model_copy(update={"groups": (plan.groups[0].model_copy(update={"cores": ()}),)})
    assert found(plan) == {"binding": ("skipped", "laptop binds no ranks to cores")}


def test_no_core_of_a_shipped_list_is_in_two_places() -> None:
    for binding in load_site("aurora").bindings:
        cores = list(itertools.chain.from_iterable(map(parse_cores, binding.cores)))
        assert len(cores) == len(set(cores))
