"""Ranks that serve each other: the same completions as one process, and what happens when a rank is slow, wrong or gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from mas_hpc.distributed.transport import Envelope
from mas_hpc.errors import RolloutError
from mas_hpc.models.attention import prepare
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.frames import Frame, decode, encode
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.placement import Placement
from mas_hpc.rollout.router import IMBALANCE, RoutedEngine, ShardedEngine
from mas_hpc.rollout.scripted import ScriptedEngine

from .conftest import build
from .memory_transport import Mail, serve, shard

TWO = Placement(mode="sharded", owners={"alpha": (0,), "beta": (1,)})
THREE = Placement(mode="sharded", owners={"alpha": (0,), "beta": (1, 2)})
PLACEMENTS = {
    "two": (2, TWO),
    "three": (3, THREE),
    "four": (4, Placement(mode="sharded", owners={"alpha": (0, 3), "beta": (1, 2)})),
    "colocated": (2, Placement(mode="colocated", owners={"alpha": (0, 1), "beta": (0, 1)})),
}


def ask(policy: str, seed: int = 0, prompt: Sequence[int] = (3, 14, 15)) -> Request:
    sampling = SamplingParams(max_new_tokens=3 + seed % 7, stop_ids=(0,))
    spans = (("", len(prompt)),)
    return Request(prompt_ids=tuple(prompt), prompt_spans=spans, policy=policy, seed=seed, sampling=sampling)


def mixed(rank: int, count: int = 12) -> list[Request]:
    """Requests of both policies, some of them siblings; different on every rank."""
    return [ask(("alpha", "beta")[i % 2], seed=100 * rank + i, prompt=(1 + rank, 2, 1 + i // 4)) for i in range(count)]


def name_of(rank: int) -> Callable[[Request], str]:
    """A behaviour that says where it ran, and for which policy."""
    return lambda request: f"{'mabcd'[rank]}{len(request.policy)}"


@pytest.fixture
def scripted(tokenizer):
    """Make the local engine of a rank: it answers with a letter of its own."""
    return lambda rank: ScriptedEngine(name_of(rank), tokenizer)


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


def test_a_rank_without_requests_serves_until_it_is_told(scripted) -> None:
    engines, _ = shard(TWO, scripted, 2)
    engines[0].submit([ask("beta")])
    ended: list[tuple[int, Completion]] = []

    def done() -> bool:
        ended.extend(engines[0].poll())
        return bool(ended)

    engines[1].serve_until(done)
    assert [completion.text for _, completion in ended] == ["a4"]


# ---- whom to ask


def targets(mail: Mail) -> list[int]:
    return [target for source, target, _ in mail.sent if source == 0]


def sent_to(mail: Mail) -> dict[int, list[Request]]:
    found: dict[int, list[Request]] = {}
    for source, target, payload in mail.sent:
        found.setdefault(target, []).extend(request for _, request in decode(payload, source).requests)
    return found


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


# ---- ranks that are slow or gone


def test_requests_of_a_silent_rank_go_to_another_owner_and_its_late_answer_is_dropped(scripted) -> None:
    engines, mail = shard(THREE, scripted, 3, stall_s=10.0)
    asked = [ask("beta", seed=1, prompt=(question, 5)) for question in range(8)]
    numbers = engines[0].submit(asked)
    before = sent_to(mail)
    ended: list[tuple[int, Completion]] = []
    for second in range(30):
        mail.now = float(second)
        for engine in engines[:2]:  # rank 2 does nothing
            ended += engine.poll()
    assert sorted(number for number, _ in ended) == numbers
    assert {completion.text for _, completion in ended} == {"a4"}
    assert len(before[2]) > 0 and sent_to(mail)[1] == before[1] + before[2]
    engines[2].poll()
    assert engines[0].poll() == []


def test_a_silent_rank_is_asked_again_once_it_has_given_a_sign_of_life(scripted) -> None:
    engines, mail = shard(THREE, scripted, 3, stall_s=10.0)
    engines[0].submit([ask("beta", prompt=(question, 5)) for question in range(8)])
    for second in range(30):
        mail.now = float(second)
        for engine in engines[:2]:
            engine.poll()
    assert sent_to_many(engines[0], mail).keys() == {1}
    engines[2].poll()
    engines[0].poll()
    assert sent_to_many(engines[0], mail).keys() == {1, 2}


def sent_to_many(engine: ShardedEngine, mail: Mail) -> dict[int, list[Request]]:
    mail.sent.clear()
    engine.submit([ask("beta", prompt=(question, 5)) for question in range(8)])
    return sent_to(mail)


def test_the_only_owner_gone_is_an_error_that_names_rank_and_policy(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2, stall_s=10.0)
    engines[0].submit([ask("beta")])
    with pytest.raises(
        RolloutError, match=r"nothing from rank 1 for rollout.stall_s=10 s, and nobody else serves policy 'beta'"
    ):
        for second in range(30):
            mail.now = float(second)
            engines[0].poll()
    assert 10 < mail.now < 13
    num_sent = len(mail.sent)
    engines[0].cancel()
    assert len(mail.sent) == num_sent


def test_a_rank_that_works_for_long_is_not_given_up(tokenizer) -> None:
    ready = False

    def local(rank: int) -> RolloutEngine:
        return ScriptedEngine(name_of(rank), tokenizer, order=lambda waiting: waiting if ready else [])

    engines, mail = shard(TWO, local, 2, stall_s=10.0)
    engines[0].submit([ask("beta", seed=1)])
    for second in range(100):
        mail.now = float(second)
        assert engines[0].poll() == engines[1].poll() == []
    beats = [decode(payload, source) for source, _, payload in mail.sent if source == 1]
    assert 90 < len(beats) <= 100 and not any(frame.completions for frame in beats)
    ready = True
    engines[1].poll()
    assert engines[0].poll()[0][1].text == "a4"


def test_time_in_which_a_rank_did_not_listen_is_no_silence_of_others(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2, stall_s=10.0)
    engines[0].submit([ask("beta", seed=1)])
    mail.now = 1000.0
    assert engines[0].poll() == []
    engines[1].poll()
    assert engines[0].poll()[0][1].text == "a4"


def test_a_message_that_arrives_twice_is_answered_once(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2)
    mail.repeats = 2
    found = serve(engines, {0: [ask("beta", seed=1), ask("alpha", seed=1)], 1: [ask("alpha", seed=1)]})
    assert [completion.text for completion in found[0] + found[1]] == ["a4", "m5", "m5"]
    assert engines[0].poll() == engines[1].poll() == []


# ---- errors


class Failing(ScriptedEngine):
    """Refuses policies by length, or breaks down."""

    breaks = False

    def submit(self, requests: Sequence[Request]) -> list[int]:
        if any(request.seed == 13 for request in requests):
            raise RolloutError("no adapter of that name")
        return super().submit(requests)

    def poll(self) -> list[tuple[int, Completion]]:
        if self.breaks:
            raise RolloutError("out of memory")
        return super().poll()


def test_a_request_that_the_owner_refuses_comes_back_as_an_error_that_names_it(tokenizer) -> None:
    engines, _ = shard(TWO, lambda rank: Failing(name_of(rank), tokenizer), 2)
    bad, good = serve(engines, {0: [ask("beta", seed=13), ask("beta", seed=1)]})[0]
    assert (bad.finish, bad.error, bad.token_ids) == ("error", "rank 1: no adapter of that name", ())
    assert good.text == "a4"


def test_an_error_of_the_remote_engine_names_its_rank(tokenizer) -> None:
    failed = Completion(token_ids=(), logprobs=(), text="", finish="error", error="too long")
    engines, _ = shard(TWO, lambda rank: ScriptedEngine(lambda request: failed, tokenizer), 2)
    found = serve(engines, {0: [ask("alpha"), ask("beta")]})[0]
    assert [completion.error for completion in found] == ["too long", "rank 1: too long"]


def test_an_engine_that_breaks_down_stops_its_rank_and_tells_those_who_wait(tokenizer) -> None:
    engines, _ = shard(TWO, lambda rank: Failing(name_of(rank), tokenizer), 2)
    engines[0].submit([ask("beta")])
    engines[1].submit([ask("beta")])
    engines[1]._local.breaks = True
    with pytest.raises(RolloutError, match="out of memory"):
        engines[1].poll()
    assert [completion.error for _, completion in engines[0].poll()] == ["rank 1: out of memory"]


def test_a_policy_that_its_supposed_owner_does_not_have_is_an_error(scripted) -> None:
    mistaken = Placement(mode="sharded", owners={"alpha": (0,), "beta": (0,), "gamma": (1,)})
    engines, mail = shard(TWO, scripted, 2)
    others, _ = shard(mistaken, scripted, 2)
    engines[1] = others[1]
    engines[1]._transport.mail = mail
    assert (
        serve(engines, {0: [ask("beta")]})[0][0].error == "rank 1: policy 'beta' is not served here; expected one of ['gamma']"
    )


def test_a_message_of_something_else_names_its_sender(scripted) -> None:
    engines, mail = shard(TWO, scripted, 2)
    mail.boxes[0].append(Envelope(source=1, payload=b"hello, world"))
    with pytest.raises(RolloutError, match="rank 1 sent a message that this rank cannot read"):
        engines[0].poll()


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
