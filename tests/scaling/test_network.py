import dataclasses

import pytest

from mas_hpc.launch.site import Link, load_site
from mas_hpc.scaling.network import NOTHING, Cost, Fabric, Fitted, double_tree, halving, rabenseifner, ring


def fabric(**changes: object) -> Fabric:
    links = {
        "card": Link(latency_us=1, gb_per_s=100), "node": Link(latency_us=2, gb_per_s=10),
        "rack": Link(latency_us=5, gb_per_s=5), "machine": Link(latency_us=10, gb_per_s=2),
    }  # fmt: skip
    return dataclasses.replace(Fabric(links=links, ranks_per_node=12, tiles_per_card=2, nodes_per_rack=64), **changes)


def test_formulas_by_hand() -> None:
    # 8 ranks, 8 MB, 1 us, 1 ns a byte
    assert ring(8e6, 8, 1e-6, 1e-9) == Cost(start=7e-6, transfer=pytest.approx(7e-3))
    assert halving(8e6, 8, 1e-6, 1e-9) == Cost(start=3e-6, transfer=pytest.approx(7e-3))
    assert rabenseifner(8e6, 8, 1e-6, 1e-9).seconds == pytest.approx(2 * (3e-6 + 7e-3))
    # two trees: (sqrt(6 us) + sqrt(8 ms))^2
    assert double_tree(8e6, 8, 1e-6, 1e-9).seconds == pytest.approx((6e-6**0.5 + 8e-3**0.5) ** 2)


def test_the_farthest_link_decides() -> None:
    assert [fabric().level(ranks) for ranks in (2, 3, 12, 13, 768, 769)] == ["card", "node", "node", "rack", "rack", "machine"]
    near, far = fabric().cost("all_gather", 1e9, 2), fabric().cost("all_gather", 1e9, 2, stride=768)
    assert near.transfer == pytest.approx(0.5 / 100)
    assert far.transfer == pytest.approx(0.5 / 2)


def test_alone_and_without_bytes_nothing_is_paid() -> None:
    assert fabric().cost("all_reduce", 1e9, 1) == fabric().cost("all_reduce", 0, 8) == NOTHING


def test_what_was_measured_wins_on_its_number_of_ranks_alone() -> None:
    measured = fabric(fitted={"all_reduce": Fitted(latency_s=0.5, s_per_byte=1e-9, ranks=4)})
    assert measured.cost("all_reduce", 1e9, 4).seconds == pytest.approx(1.5)
    assert measured.cost("all_reduce", 1e9, 8) == fabric().cost("all_reduce", 1e9, 8)


def test_a_hierarchy_sends_a_part_of_the_bytes_between_nodes() -> None:
    # inside 12 ranks: twice 11/12 of 1.2 GB at 10 GB/s; between 2 nodes: 0.1 GB, twice a half, at 5 GB/s
    found = fabric().cost("all_reduce", 1.2e9, 24, "hierarchical")
    assert found.transfer == pytest.approx(2 * 0.11 + 0.02)
    assert found.transfer < fabric().cost("all_reduce", 1.2e9, 24).transfer


def test_transfers_hide_behind_longer_passes_and_start_up_times_do_not() -> None:
    assert Cost(start=0.1, transfer=1.0).beside(100.0) == pytest.approx(100.1)
    assert Cost(start=0.1, transfer=100.0).beside(1.0) == pytest.approx(100.1)
    assert Cost(start=0.1, transfer=1.0).beside(1.0) == pytest.approx(0.1 + 2**0.25)


def test_more_ranks_never_cost_less() -> None:
    site = load_site("aurora")
    links = Fabric(links=site.links, ranks_per_node=12, tiles_per_card=2, nodes_per_rack=64)
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        seconds = [links.cost(collective, 1e8, 2**power).seconds for power in range(1, 17)]
        assert seconds == sorted(seconds), collective
