"""Ranks that serve each other: the same completions as one process, whom they ask, and new weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from mas_hpc.distributed.transport import Envelope
from mas_hpc.errors import RolloutError
from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine
from mas_hpc.rollout.frames import Frame, encode
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.placement import Placement
from mas_hpc.rollout.router import RoutedEngine
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollout.sharded import IMBALANCE, ShardedEngine

from .conftest import build
from .memory_transport import THREE, TWO, Mail, ask, name_of, sent_to, serve, shard

PLACEMENTS = {
    "two": (2, TWO),
    "three": (3, THREE),
    "four": (4, Placement(mode="sharded", owners={"alpha": (0, 3), "beta": (1, 2)})),
    "colocated": (2, Placement(mode="colocated", owners={"alpha": (0, 1), "beta": (0, 1)})),
}


def mixed(rank: int, count: int = 12) -> list[Request]:
    """Requests of both policies, some of them siblings; different on every rank."""
    return [ask(("alpha", "beta")[i % 2], seed=100 * rank + i, prompt=(1 + rank, 2, 1 + i // 4)) for i in range(count)]


# ---- the same completions


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    second = build("llama")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return {"alpha": prepare(build("llama")), "beta": prepare(second)}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_completions_are_those_of_one_process_with_all_models(case: str, models, tokenizer) -> None:
    size, placement = PLACEMENTS[case]

    def local(rank: int) -> RolloutEngine:
        own = {policy: NativeEngine(models[policy], tokenizer, max_rows=4) for policy in placement.policies_of(rank)}
        return RoutedEngine(None, own)

    asked = {rank: mixed(rank) for rank in range(size)}
    found = serve(shard(placement, local, size)[0], asked)
    alone = RoutedEngine(None, {policy: NativeEngine(model, tokenizer) for policy, model in models.items()})
    for rank, requests in asked.items():
        for one, other in zip(found[rank], alone.generate(requests), strict=True):
            assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-10)


def test_answers_come_from_the_owners_in_any_order(tokenizer) -> None:
    def local(rank: int) -> RolloutEngine:
        return ScriptedEngine(name_of(rank), tokenizer, order=lambda waiting: waiting[-1:])

    engines, _ = shard(TWO, local, 2)
    found = serve(engines, {0: [ask("beta"), ask("alpha"), ask("beta")], 1: [ask("beta"), ask("alpha")]})
    assert [[completion.text for completion in found[rank]] for rank in (0, 1)] == [["a4", "m5", "a4"], ["a4", "m5"]]


def test_requests_may_follow_while_others_are_outstanding(scripted) -> None:
    engines, _ = shard(TWO, scripted, 2)
    first = engines[0].submit([ask("beta", 1)])
    second = engines[0].submit([ask("beta", 2), ask("alpha", 3)])
    assert first + second == [0, 1, 2]
    assert engines[0].poll() == [(2, engines[0]._local.generate([ask("alpha", 3)])[0])]
    engines[1].poll()
    assert [number for number, _ in engines[0].poll()] == [0, 1]


def test_a_rank_that_is_finished_serves_the_others_until_they_are_too(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2)
    engines[0].submit([ask("beta")])
    ended: list[tuple[int, Completion]] = []

    def other_rank(_: float) -> None:
        """What rank 0 does while rank 1 waits."""
        if not ended:
            ended.extend(engines[0].poll())
        else:
            naps = iter(range(2))
            mail.sleep = lambda _: next(naps)  # rank 1 has said that it is finished
            engines[0].serve_others()

    mail.sleep = other_rank
    engines[1].serve_others()
    assert [completion.text for _, completion in ended] == ["a4"]


# ---- whom to ask


def targets(mail: Mail) -> list[int]:
    return [target for source, target, _ in mail.sent if source == 0]


def test_a_submission_is_one_message_an_owner_and_none_for_own_policies(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2)
    engines[0].submit([ask("beta", seed) for seed in range(5)] + [ask("alpha")])
    engines[0].submit([ask("alpha")])
    assert targets(mail) == [1]
    assert engines[0].traffic.frames_sent == 1 and engines[0].traffic.bytes_sent == len(mail.sent[0][2])
    engines[1].poll()
    assert engines[1].traffic.bytes_received == engines[0].traffic.bytes_sent


def test_siblings_and_later_turns_go_to_one_owner_and_questions_to_all(scripted) -> None:
    engines, mail = shard(THREE, scripted, 3)
    for question in range(6):
        later = replace(ask("beta", prompt=(question, 5, 9, 9, 4)), prompt_spans=(("", 2), ("alpha", 2), ("", 1)))
        engines[0].submit([*(ask("beta", seed, prompt=(question, 5)) for seed in range(2)), later])
    asked = sent_to(mail)
    assert asked.keys() == {1, 2}
    questions = {rank: {request.prompt_ids[0] for request in requests} for rank, requests in asked.items()}
    assert not questions[1] & questions[2]


def test_no_owner_has_much_more_to_do_than_another(scripted) -> None:
    engines, mail = shard(THREE, scripted, 3)
    engines[0].submit([ask("beta", seed) for seed in range(101)])
    counts = sorted(len(requests) for requests in sent_to(mail).values())
    assert sum(counts) == 101 and counts[1] - counts[0] == IMBALANCE + 1


def test_what_an_owner_does_for_others_counts_as_its_load(scripted) -> None:
    engines, mail = shard(THREE, scripted, 3)
    home = next(iter(sent_to_after(engines[0], mail)))
    busy = encode(Frame(epoch=0, load=IMBALANCE + 2))
    engines[0]._transport.mail.boxes[0].append(Envelope(source=home, payload=busy))
    engines[0].poll()
    assert sent_to_after(engines[0], mail).keys() == {3 - home}
    mail.now = 9.0  # what it said is old
    engines[0].poll()
    assert home in sent_to_after(engines[0], mail)


def sent_to_after(engine: ShardedEngine, mail: Mail) -> dict[int, list[Request]]:
    mail.sent.clear()
    engine.submit([ask("beta")])
    return sent_to(mail)


def test_an_unknown_policy_is_refused_before_anything_is_sent(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2)
    with pytest.raises(
        RolloutError, match=r"policies \['gamma'\]: no rank serves them; expected policies among \['alpha', 'beta'\]"
    ):
        engines[0].submit([ask("beta"), ask("alpha"), ask("gamma")])
    assert mail.sent == [] and engines[0]._local.requests == []


# ---- cancel and load


def test_cancel_is_told_to_the_owners_and_leaves_the_requests_of_others(tokenizer) -> None:
    ready = False

    def local(rank: int) -> RolloutEngine:
        return ScriptedEngine(name_of(rank), tokenizer, order=lambda waiting: waiting if ready else [])

    engines, _ = shard(TWO, local, 2)
    engines[0].submit([ask("alpha", 1), ask("beta", 1)])
    engines[1].submit([ask("alpha", 2), ask("beta", 2)])
    for engine in engines * 2:
        engine.poll()
    engines[0].cancel()
    kept = engines[0].submit([ask("beta", 3)])
    ready = True
    ended: list[list[tuple[int, Completion]]] = [[], []]
    for _ in range(3):
        for rank, engine in enumerate(engines):
            ended[rank] += engine.poll()
    assert [number for number, _ in ended[0]] == kept
    assert sorted(number for number, _ in ended[1]) == [0, 1]
    assert [request.seed for request in engines[1]._local.requests] == [2, 1, 2, 3]  # 2 began anew when 1 was dropped


def test_a_request_waits_until_its_owner_has_loaded_the_weights_that_it_is_for(scripted) -> None:
    engines, _ = shard(TWO, scripted, 2)
    engines[0].load(version=1)
    engines[0].submit([ask("beta")])
    for engine in engines * 2:
        assert engine.poll() == []
    engines[1].load(version=1)
    engines[1].poll()
    assert [completion.policy_version for _, completion in engines[0].poll()] == [1]


def test_what_is_left_over_is_dropped_by_load(tokenizer) -> None:
    slow = {"order": lambda waiting: []}
    engines, _ = shard(TWO, lambda rank: ScriptedEngine(name_of(rank), tokenizer, **slow), 2)
    engines[0].submit([ask("beta", 1)])
    engines[1].poll()
    engines[0].cancel()
    for engine in engines:
        engine.load(version=1)
    assert engines[1]._local._waiting == [] and engines[1].poll() == []


def test_a_request_for_weights_that_are_gone_is_an_error(scripted) -> None:
    engines, _ = shard(TWO, scripted, 2)
    engines[0].submit([ask("beta")])
    engines[1].load(version=1)
    engines[1].poll()
    assert "weights were loaded 1 times here, but 0 times" in engines[0].poll()[0][1].error


def test_stats_are_those_of_the_local_engine(scripted) -> None:
    engines, _ = shard(TWO, scripted, 2)
    serve(engines, {0: [ask("beta"), ask("beta"), ask("alpha")]})
    assert [engine.stats.requests for engine in engines] == [1, 2]


def test_without_the_trained_model_a_process_has_no_weights_to_load(scripted) -> None:
    routed = RoutedEngine(None, {"judge": scripted(0)})
    assert routed.load(version=3) == ""
    assert routed.generate([ask("judge")])[0].policy_version == 0


def test_a_rank_that_others_still_ask_does_not_sleep(scripted):
    engines, _ = shard(TWO, scripted, 2)
    slept: list[int] = []
    engines[1]._local.sleep = lambda: slept.append(len(engines[1]._serving))
    engines[0].submit([ask("beta", seed=1)])
    engines[1]._local.poll = list  # it takes long
    engines[1].poll()
    engines[1].sleep()
    assert slept == []
    engines[0].cancel()
    engines[1].poll()
    engines[1].sleep()
    assert slept == [0]
