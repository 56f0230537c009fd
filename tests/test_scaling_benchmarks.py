"""The scaling benchmark's own arithmetic: queues with known delays, and the product's code over a counted store."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # benchmarks are scripts that stand beside each other

from scaling.cases import START, STEPS, Case, Found, launch_words, read_all, start_overrides
from scaling.control_plane import binding, outcome, simulated_rate
from scaling.counted_store import CountedStore, Request
from scaling.loads import MAX_MESSAGES, Level, Load, Network, burst, repeat, steadily
from scaling.measure_store import WORDS, Cost, Measured, _fill, fit, request_of
from scaling.parts import PARTS, look, notes, results, starting, weight_sync
from scaling.parts import levels as tree_levels
from scaling.players import JOBS, Players
from scaling.run import efficiency, equal_rows
from scaling.simulation import Message, Process, Simulation, Station

COST = Cost(message_s=4e-6, answer_s=3e-6, key_s=1e-7, byte_s=4e-10)
NETWORK = Network(cost=COST, round_trip_s=5e-5)


# ---- queues


def test_messages_wait_for_those_before_them() -> None:
    station = Station("one")
    assert [station.serve(now, 2.0) for now in (0.0, 1.0, 9.0)] == [2.0, 4.0, 11.0]
    assert station.delays_s == [2.0, 3.0, 2.0]
    assert (station.busy_s, station.num_served, station.delay_s(0.99), station.delay_s(0.5)) == (6.0, 3, 3.0, 2.0)


def test_who_waits_for_an_answer_goes_on_after_service_and_round_trip() -> None:
    simulation, station, times = Simulation(round_trip_s=1.0), Station("one"), []

    def client() -> Process:
        yield Message(station, 2.0)
        times.append(simulation.now)
        yield Message(station, 2.0, answered=False)
        times.append(simulation.now)
        yield 5.0
        times.append(simulation.now)

    simulation.start(client(), 10.0)
    assert simulation.run() == 18.0
    assert times == [13.0, 13.0, 18.0]


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_random_arrivals_at_equal_service_wait_as_long_as_theory_says(utilisation: float) -> None:
    # M/D/1: mean wait rho / (2 (1 - rho)) services, by Pollaczek and Khinchine
    simulation, station, rng = Simulation(), Station("one"), random.Random(1)

    def arrivals() -> Process:
        for _ in range(60_000):
            yield rng.expovariate(utilisation)
            yield Message(station, 1.0, answered=False)

    simulation.start(arrivals())
    simulation.run()
    mean_wait = sum(station.delays_s) / len(station.delays_s) - 1.0
    assert mean_wait == pytest.approx(utilisation / (2 * (1 - utilisation)), rel=0.06)


@pytest.mark.parametrize(("clients", "rate"), [(1, 1 / 5.0), (3, 3 / 5.0), (5, 1.0), (50, 1.0)])
def test_clients_that_each_wait_for_an_answer_share_the_station(clients: int, rate: float) -> None:
    # closed: n clients, service s, round trip r: n / (s + r) messages a second until the station is full at 1 / s
    network = Network(cost=Cost(message_s=1.0, answer_s=0.0, key_s=0.0, byte_s=0.0), round_trip_s=4.0)
    bill = [Request(messages=1, keys=1, num_bytes=0)]

    def processes(station: Station) -> Iterator[tuple[float, Process]]:
        return ((float(number % 5), repeat(network, station, bill, 0.0)) for number in range(clients))

    assert steadily(network, processes).messages_per_s == pytest.approx(rate, rel=0.2)


# ---- the counted store


def test_a_counted_store_answers_as_a_real_one() -> None:
    def talk(store: HashStore | CountedStore) -> list[object]:
        store.set("a", "1")
        found: list[object] = [store.get("a"), store.add("n", 3), store.add("n", 4), store.add("a", 1), store.check(["a", "b"])]
        found += [store.compare_set("won", "", "first"), store.compare_set("won", "", "second"), store.check(["won"])]
        found += [store.compare_set("won", "first", "third"), store.get("won"), store.multi_get(["a", "n"])]
        store.append("list", "x,")
        store.append("list", "y,")
        return [*found, store.get("list"), store.delete_key("list"), store.delete_key("list"), store.check(["list"])]

    assert talk(CountedStore()) == talk(HashStore())


def test_requests_are_billed_with_their_messages_keys_and_bytes() -> None:
    assert request_of("set") == Request(messages=1, keys=1, num_bytes=120, answered=False)
    assert request_of("get") == Request(messages=2, keys=1, num_bytes=120)
    assert request_of("get_window") == Request(messages=2, keys=64, num_bytes=64 * 120)
    assert request_of("check_window") == Request(messages=1, keys=64, num_bytes=0)
    assert COST.of(request_of("get_window")) == pytest.approx(2 * (7e-6 + 64e-7) + 64 * 120 * 4e-10)


def test_the_cost_that_made_the_measurements_is_found_again() -> None:
    rows = [
        Measured(word=word, clients=8, words_per_s=1.0, host_s=COST.of(request_of(word)), client_s=1e-5) for word in WORDS
    ]  # fmt: skip
    found = fit(rows)
    assert (found.message_s, found.answer_s) == pytest.approx((COST.message_s, COST.answer_s), rel=1e-6)
    assert (found.key_s, found.byte_s) == pytest.approx((COST.key_s, COST.byte_s), rel=1e-6)


def test_every_word_is_one_that_a_store_understands() -> None:
    store = HashStore()
    _fill(store)
    for word in WORDS.values():
        word(store, "0")


# ---- the parts


def test_every_job_is_played_once_and_by_all_the_ranks_together() -> None:
    players = Players(Level(clients=12), NETWORK)
    ended_s = players.play()
    assert sorted(players.played) == list(range(12 * JOBS))
    assert players.last_s <= ended_s <= players.last_s + 0.1
    assert players.station.busy_s < 0.05 * ended_s
    finishing = [key for key in players.store.values if key.startswith("1/won/")]
    assert len(finishing) == 12 * JOBS


def test_a_client_that_stands_for_a_node_plays_the_jobs_of_its_ranks() -> None:
    players = Players(Level(clients=4, leaves=3), NETWORK)
    players.play()
    assert sorted(players.played) == list(range(4 * 3 * JOBS))


def test_levels_of_a_tree() -> None:
    assert tree_levels(1, ()) == [Level(clients=12)]
    assert tree_levels(1, (12, 64)) == [Level(clients=12)]
    assert tree_levels(100, (12,)) == [Level(clients=12), Level(clients=100, leaves=12)]
    assert tree_levels(10_000, (12, 64)) == [
        Level(clients=12), Level(clients=64, leaves=12), Level(clients=157, leaves=768),
    ]  # fmt: skip


def test_a_look_of_the_supervisor_takes_six_messages_a_window() -> None:
    assert sum(one.messages for one in look(Level(clients=640))) == 2 * 3 * 10


@pytest.mark.parametrize("part", [starting, notes, weight_sync])
def test_words_grow_with_the_ranks_and_not_with_their_square(part) -> None:  # type: ignore[no-untyped-def]
    few, many = (part(Level(clients=clients), NETWORK) for clients in (256, 1024))
    words = [load.messages_per_s * ((10.0 if part is starting else 0.1) + load.took_s) for load in (few, many)]
    assert words[1] / words[0] == pytest.approx(4.0, rel=0.05)


def test_all_traces_to_all_ranks_grow_with_the_square() -> None:
    few, many = (results(Level(clients=clients), NETWORK) for clients in (64, 256))
    assert many.utilisation * (0.1 + many.took_s) / (few.utilisation * (0.1 + few.took_s)) == pytest.approx(16.0, rel=0.05)


def test_a_burst_that_is_too_long_to_simulate_takes_the_sum_of_its_services() -> None:
    bill = [Request(messages=1, keys=64, num_bytes=3000)] * 40
    simulated = burst(NETWORK, [(1000, bill)], over_s=0.1)
    assert simulated.took_s == pytest.approx(1000 * NETWORK.busy_s(bill) - 0.1, rel=0.05)
    clients = MAX_MESSAGES // 40 + 1
    computed = burst(NETWORK, [(clients, bill)], over_s=0.1)
    assert computed.took_s == pytest.approx(clients * NETWORK.busy_s(bill) - 0.1)


def test_what_binds_is_what_is_nearest_to_its_limit() -> None:
    load = Load(messages_per_s=1.0, utilisation=0.4, p99_s=0.01, took_s=0.6)
    assert binding(PARTS["tickets"], load) == ("busy", 0.4, 0.5)
    assert binding(PARTS["notes"], load) == ("took_s", 0.6, 1.0)
    loads = {12: load, 100: Load(messages_per_s=9.0, utilisation=0.1, p99_s=0.01, took_s=0.9)}
    found = outcome("notes", 100, "tree 12", lambda level: loads[level.clients])
    assert (found.level.clients, found.load.took_s, found.row.holds) == (100, 1.5, False)


def test_the_real_store_s_rate_is_predicted_from_cpu_times() -> None:
    # 8 clients of one interpreter, 20 us each, and a host of 5 us: the interpreter is full
    row = Measured(word="add", clients=8, words_per_s=0.0, host_s=5e-6, client_s=20e-6)
    assert simulated_rate(row, 0.0) == pytest.approx(50_000, rel=0.01)
    alone = Measured(word="add", clients=1, words_per_s=0.0, host_s=5e-6, client_s=20e-6)
    assert simulated_rate(alone, 12.5e-6) == pytest.approx(1 / 50e-6, rel=0.01)


# ---- ranks


def test_efficiency_by_hand() -> None:
    assert efficiency("train", "weak", {1: 2.0, 2: 2.5, 4: 4.0}) == {1: 1.0, 2: 0.8, 4: 0.5}
    assert efficiency("train", "strong", {1: 8.0, 2: 4.0, 4: 2.5}) == {1: 1.0, 2: 1.0, 4: 0.8}
    assert efficiency("step", "strong", {12: 8.0, 24: 5.0}) == {12: 1.0, 24: 0.8}


def test_names_say_what_a_run_folder_holds(tmp_path: Path) -> None:
    case = Case(kind="train", mode="strong", ranks=2, starter="mpiexec")
    folder = tmp_path / case.name
    (folder / "heartbeats").mkdir(parents=True)
    steps = [
        {"phase": "train", "step": n, "grad_norm": 3.0 - n, "time/step": 9.0 if n == 0 else float(n)} for n in range(STEPS)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    with pytest.raises(ValueError, match="0 ranks have left heartbeats, its name says 2"):
        read_all(tmp_path)
    for rank in range(2):
        (folder / "heartbeats" / f"rank_{rank}.json").write_text("{}")
    (found,) = read_all(tmp_path)
    assert found == Found(case=case, seconds=2.5, grad_norms=(3.0, 2.0, 1.0, 0.0, -1.0), traces={})


def test_other_gradients_and_other_tokens_are_seen() -> None:
    def trained(ranks: int, norm: float) -> Found:
        case = Case(kind="train", mode="strong", ranks=ranks, starter="torchrun")
        return Found(case=case, seconds=1.0, grad_norms=(norm, 0.0), traces={})

    def rolled(ranks: int, tokens: list[int]) -> Found:
        case = Case(kind="rollout", mode="strong", ranks=ranks, starter="torchrun")
        return Found(case=case, seconds=1.0, grad_norms=(), traces={"a": [[1, 2]], "b": [tokens]})

    assert [row.holds for row in equal_rows([trained(1, 3.0), trained(2, 3.00001), trained(4, 3.001)])] == [True, False]
    rows = equal_rows([rolled(2, [3]), rolled(1, [3]), rolled(4, [4])])
    assert [(row.ours, row.holds) for row in rows] == [(1.0, True), (0.5, False)]


def test_the_same_case_is_a_job_of_a_site() -> None:
    case = Case(kind="step", mode="weak", ranks=24, starter="aurora")
    words = launch_words(case, most_ranks=24, nodes=2, options=["-A", "PROJECT"])
    assert words[:9] == ["mas-hpc", "launch", "configs/grpo.yaml", "--site", "aurora", "--nodes", "2", "--job", "train"]
    assert {"name=step-weak-24-aurora-r0", "method.tasks_per_step=768"} <= set(words)
    # All begin with one model, which no rank warms up anew; what the user adds comes last, so that it counts.
    assert {"warm_start=null", f"model.path=runs/{START}/model"} <= set(words) and words[-2:] == ["-A", "PROJECT"]
    assert f"name={START}" in start_overrides() and "warm_start=null" not in start_overrides()
