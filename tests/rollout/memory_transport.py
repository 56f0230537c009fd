"""Ranks in one thread: messages through lists, faults on request, and a clock that tests set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from mas_hpc.distributed.transport import Envelope
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.frames import decode
from mas_hpc.rollout.placement import Placement
from mas_hpc.rollout.sharded import ShardedEngine

TWO = Placement(mode="sharded", owners={"alpha": (0,), "beta": (1,)})
THREE = Placement(mode="sharded", owners={"alpha": (0,), "beta": (1, 2)})


class Mail:
    """What is on its way: payloads by receiver, with their senders."""

    def __init__(self) -> None:
        self.boxes: dict[int, list[Envelope]] = defaultdict(list)
        self.sent: list[tuple[int, int, bytes]] = []
        """(source, target, payload) of every message."""
        self.now = 0.0
        self.sleep: Callable[[float], None] = lambda pause_s: None
        self.repeats = 1
        """How often each message arrives."""


class MemoryTransport:
    """A rank's end of the mail."""

    def __init__(self, mail: Mail, rank: int, size: int) -> None:
        self.mail, self.rank, self.size = mail, rank, size

    def send(self, target: int, payload: bytes) -> None:
        assert target != self.rank
        self.mail.sent.append((self.rank, target, payload))
        self.mail.boxes[target] += [Envelope(source=self.rank, payload=payload)] * self.mail.repeats

    def receive(self) -> list[Envelope]:
        return self.mail.boxes.pop(self.rank, [])

    def close(self) -> None:
        pass


def shard(
    placement: Placement, local: Callable[[int], RolloutEngine], size: int, *, stall_s: float = 100.0
) -> tuple[list[ShardedEngine], Mail]:
    """The engines of all ranks and the mail between them."""
    mail = Mail()
    engines = [
        ShardedEngine(
            local(rank), placement, MemoryTransport(mail, rank, size), stall_s=stall_s, clock=lambda: mail.now,
            sleep=lambda pause_s: mail.sleep(pause_s),
        )
        for rank in range(size)
    ]  # fmt: skip
    return engines, mail


def serve(engines: Sequence[RolloutEngine], asked: Mapping[int, Sequence[Request]]) -> dict[int, list[Completion]]:
    """Submit each rank's requests and poll all ranks in turn until everything is answered; completions in order of request."""
    numbers = {rank: engines[rank].submit(requests) for rank, requests in asked.items()}
    served: dict[int, dict[int, Completion]] = {rank: {} for rank in asked}
    for _ in range(10_000):
        if all(len(served[rank]) == len(numbers[rank]) for rank in asked):
            break
        for rank, engine in enumerate(engines):
            ended = engine.poll()
            assert rank in asked or not ended
            for number, completion in ended:
                assert number not in served[rank], "answered twice"
                served[rank][number] = completion
    return {rank: [served[rank][number] for number in numbers[rank]] for rank in asked}


def ask(policy: str, seed: int = 0, prompt: Sequence[int] = (3, 14, 15)) -> Request:
    sampling = SamplingParams(max_new_tokens=3 + seed % 7, stop_ids=(0,))
    spans = (("", len(prompt)),)
    return Request(prompt_ids=tuple(prompt), prompt_spans=spans, policy=policy, seed=seed, sampling=sampling)


def name_of(rank: int) -> Callable[[Request], str]:
    """A behaviour that says where it ran, and for which policy."""
    return lambda request: f"{'mabcd'[rank]}{len(request.policy)}"


def sent_to(mail: Mail) -> dict[int, list[Request]]:
    found: dict[int, list[Request]] = {}
    for source, target, payload in mail.sent:
        found.setdefault(target, []).extend(request for _, request in decode(payload, source).requests)
    return found
