"""What followers hear of the engine of the rank that leads them; see tests/phases/test_tensor_run.py for real ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from mas_hpc.errors import LostPeerError, RolloutError, RunStopped
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.rollout.native.kv_tree import KVTree, path_keys
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollout.tensor import BEAT_S, TensorEngine


class Group:
    """A rank of two; what the first tells waits for the second."""

    def __init__(self, rank: int, told: deque[bytes]) -> None:
        self.rank, self.size, self._told = rank, 2, told

    def first_bytes(self, data: bytes) -> bytes:
        if self.rank:
            return self._told.popleft()
        self._told.append(data)
        return data


class Recorded(ScriptedEngine):
    """Notes its calls."""

    def __init__(self, tokenizer) -> None:
        super().__init__(lambda request: request.policy, tokenizer, order=lambda waiting: waiting[:1])
        self.calls: list[str] = []

    def submit(self, requests):
        if any(request.policy == "nobody" for request in requests):
            raise RolloutError("nobody is not served")
        self.calls.append(f"submit {len(requests)}")
        return super().submit(requests)

    def poll(self):
        self.calls.append("poll")
        return super().poll()

    def cancel(self) -> None:
        self.calls.append("cancel")
        super().cancel()


class Two:
    """A leader and a follower, one after the other."""

    def __init__(self, tokenizer) -> None:
        self.told: deque[bytes] = deque()
        self.now = 0.0
        self.locals = [Recorded(tokenizer) for _ in range(2)]
        self.leader, self.follower = (
            TensorEngine(local, Group(rank, self.told), clock=lambda: self.now)  # type: ignore[arg-type]
            for rank, local in enumerate(self.locals)
        )

    def led(self, work: Callable[[], str]) -> list[str]:
        """What both say."""

        def unplayed() -> str:
            raise AssertionError("a follower plays nothing")

        return [engine.led(play, str, str) for engine, play in ((self.leader, work), (self.follower, unplayed))]


@pytest.fixture
def two(tokenizer) -> Two:
    return Two(tokenizer)


def ask(policy: str, seed: int = 0) -> Request:
    return Request(
        prompt_ids=(1, 2), prompt_spans=(("", 2),), policy=policy, seed=seed, sampling=SamplingParams(max_new_tokens=4)
    )


def test_a_follower_does_what_its_leader_does_and_hears_what_comes_of_it(two: Two) -> None:
    def work() -> str:
        two.leader.submit([ask("a", 1), ask("b", 2)])
        two.leader.submit([ask("c", 3)])
        served = [completion.text for _ in range(3) for _, completion in two.leader.poll()]
        assert two.leader.poll() == []  # idle: nobody is told
        return " ".join(served)

    assert two.led(work) == ["a b c", "a b c"]
    assert two.locals[0].calls == two.locals[1].calls == ["submit 2", "submit 1", "poll", "poll", "poll"]
    assert two.locals[0].requests == two.locals[1].requests  # each submission by itself: their order decides who is admitted
    assert not two.told


def test_what_is_cancelled_is_told_with_what_comes_next(two: Two) -> None:
    def work() -> str:
        two.leader.submit([ask("a")])
        two.leader.cancel()
        assert len(two.told) == 1  # a follower that is in a broken step does not listen
        two.leader.submit([ask("b")])
        served = two.leader.poll()
        two.leader.cancel()
        return served[0][1].text

    assert two.led(work) == ["b", "b"]
    assert two.locals[0].calls == two.locals[1].calls == ["submit 1", "cancel", "submit 1", "poll", "cancel"]


def test_a_request_that_is_refused_reaches_nobody(two: Two) -> None:
    def work() -> str:
        with pytest.raises(RolloutError, match="nobody is not served"):
            two.leader.submit([ask("nobody")])
        return ""

    two.led(work)
    assert two.locals[1].calls == []


def test_a_leader_that_waits_says_so_now_and_then(two: Two) -> None:
    two.leader.poll()
    assert not two.told
    two.now += BEAT_S
    two.leader.poll()
    two.leader.poll()
    assert len(two.told) == 1
    assert two.led(lambda: "done") == ["done", "done"] and two.locals[1].calls == []


@pytest.mark.parametrize(
    "error, heard, said",
    [
        (RunStopped("asked to end"), RunStopped, "^asked to end$"),
        (RolloutError("all turns failed"), LostPeerError, "leads this one's tensor group cannot go on: all turns failed"),
    ],
)
def test_followers_end_with_their_leader(two: Two, error: Exception, heard: type[Exception], said: str) -> None:
    def work() -> str:
        raise error

    with pytest.raises(type(error), match=str(error)):
        two.leader.led(work, str, str)
    with pytest.raises(heard, match=said):
        two.follower.led(work, str, str)


def test_of_leaves_that_are_equally_old_every_rank_evicts_the_same() -> None:
    """Trees that are told the same, in processes whose objects lie elsewhere."""

    def left() -> list[int]:
        tree, clutter = KVTree(8), []
        for first in range(1, 9):
            clutter.append([object() for _ in range(first * 7 % 5)])
            node = tree.insert(path_keys([first], [-1]))
            node.used = 0
        assert tree.make_room(3)
        return sorted(tree.root.children)

    assert left() == left() == sorted(left())
    assert left() == [int(key) for key in path_keys([1, 2, 3, 4, 5], [-1] * 5)]
