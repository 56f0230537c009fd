"""Ranks that serve each other, when one of them is slow, wrong or gone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mas_hpc.distributed.transport import Envelope
from mas_hpc.errors import RolloutError
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine
from mas_hpc.rollout.frames import decode
from mas_hpc.rollout.placement import Placement
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollout.sharded import ShardedEngine

from .memory_transport import THREE, TWO, Mail, ask, name_of, sent_to, serve, shard

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


def test_a_rank_that_works_for_long_is_waited_for_and_one_that_is_gone_is_named(scripted) -> None:
    engines, mail = shard(THREE, scripted, 3, stall_s=10.0)

    def wait(_: float) -> None:
        mail.now += 1.0
        engines[1].poll()  # and rank 2 does nothing

    mail.sleep = wait
    with pytest.raises(RolloutError, match=r"rank 0 has heard nothing from rank 2 for rollout.stall_s=10 s"):
        engines[0].serve_others()
    assert 10 < mail.now < 14
