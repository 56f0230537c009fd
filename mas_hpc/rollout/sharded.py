"""Ranks that serve each other: each has some of the policies, and token ids travel between them."""

from __future__ import annotations

import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mas_hpc.distributed.transport import Transport
from mas_hpc.errors import LostPeerError, RolloutError
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, RolloutStats, Weights
from mas_hpc.rollout.frames import Frame, decode, encode
from mas_hpc.rollout.placement import Placement

BEAT_S = 1.0
"""A rank that works for another sends it something at least so often."""
IMBALANCE = 16
"""Requests that an owner may have more than the least loaded one for the sake of a prefix that it has already run."""
FRESH_S = 5.0
"""What an owner said of its load is believed for so long: one that has nothing of ours says nothing any more."""
IDLE_S = 0.002
"""Pause of `serve_others` after a poll that had nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Messages of this rank since its engine was made.

    Example: Traffic(frames_sent=2, bytes_sent=831, frames_received=1, bytes_received=402)
    """

    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request of this rank that is not answered."""

    request: Request
    owner: int
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Serving:
    """A request in this rank's own engine: whose it is, and under which number."""

    source: int
    number: int
    request: Request


@dataclass(slots=True)
class _Peer:
    """What this rank knows of another."""

    heard: float = 0.0
    """When it last sent something, in seconds that this rank has listened."""
    told: float = 0.0
    """When this rank last sent it something, by the clock."""
    load: int = 0
    """Requests that it has outstanding, without those of this rank."""
    silent: bool = False
    """Whether it gave no sign of life when it should have."""
    finished: int = 0
    """How often it has called `serve_others`."""


class ShardedEngine(RolloutEngine):
    """Serves the policies that this rank owns, for itself and for the other ranks, and asks their owners for all others.

    `local` is the engine of the policies that `placement` gives to this rank. All work is done in `poll`: a rank without
    requests of its own goes on polling (`serve_others`) for as long as others may need it. `load` is called by all ranks
    equally often; a request waits until its owner has loaded as often as the rank that asks. The tokens and log-probs are
    those that one process with all models would give.

    An owner sends a sign of life every BEAT_S. One that is not heard for `stall_s` loses its requests to another owner of the
    policy; without one, `poll` raises LostPeerError. Time in which this rank did not listen does not count.
    Example: ShardedEngine(NativeEngine(model, tokenizer), placement, open_transport(world, timeout_s=300.0), stall_s=300.0)
    """

    def __init__(
        self, local: RolloutEngine, placement: Placement, transport: Transport, *, stall_s: float,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        self._local, self._transport, self._rank = local, transport, transport.rank
        self._owners = placement.owners
        self._own = frozenset(placement.policies_of(transport.rank))
        self._stall_s, self._clock, self._sleep, self._looked = stall_s, clock, sleep, clock()
        self._now = 0.0
        """Seconds that this rank has listened."""
        self._peers = {rank: _Peer() for rank in range(transport.size) if rank != self._rank}
        self._asked: dict[int, _Asked] = {}
        self._serving: dict[int, _Serving] = {}
        """By the local engine's number."""
        self._early: list[tuple[int, int, tuple[tuple[int, Request], ...]]] = []
        """(epoch, rank, requests) for weights that are not loaded here yet."""
        self._ended: list[tuple[int, Completion]] = []
        self._count = self._epoch = self._finished = 0
        self._traffic = Traffic()

    @property
    def stats(self) -> RolloutStats:
        """Totals of the local engine, which are those of the policies that this rank owns."""
        return self._local.stats

    @property
    def traffic(self) -> Traffic:
        """Messages to and from other ranks."""
        return self._traffic

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """See RolloutEngine; the local engine loads. What it still does for others is dropped: they have gone on too."""
        assert not self._asked, "load while requests are outstanding"
        if self._serving:
            self._local.cancel()
            self._serving.clear()
        self._epoch += 1
        checksum = self._local.load(version=version, weights=weights)
        early, self._early = self._early, []
        for epoch, source, requests in early:
            self._accept(source, epoch, requests)
        return checksum

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue own policies' requests in the local engine and send the others to an owner, one message a rank."""
        unknown = sorted({request.policy for request in requests} - self._owners.keys())
        if unknown:
            raise RolloutError(
                f"policies {unknown}: no rank serves them; expected policies among {sorted(self._owners)}; "
                "correct the agents' policy, or name a model for it in team.models"
            )
        numbered = list(enumerate(requests, self._count))
        mine = [(number, request) for number, request in numbered if request.policy in self._own]
        self._queue(mine, self._local.submit([request for _, request in mine]) if mine else [])
        self._count += len(requests)
        self._send_requests([(number, request) for number, request in numbered if request.policy not in self._own])
        return [number for number, _ in numbered]

    def poll(self) -> list[tuple[int, Completion]]:
        """Read messages, let the local engine work, answer; return own requests that have ended, here or elsewhere."""
        looked, self._looked = self._looked, self._clock()
        self._now += min(self._looked - looked, self._stall_s / 10)
        for envelope in self._transport.receive():
            self._read(envelope.source, envelope.payload)
        self._ask_others_than_stalled()
        self._work()
        self._beat()
        ended, self._ended = self._ended, []
        return ended

    def sleep(self) -> None:
        """The local engine gives back its memory, unless it works for others."""
        assert not self._asked, "sleep while requests are outstanding"
        if not self._serving:
            self._local.sleep()

    def cancel(self) -> None:
        """Forget own requests, and tell the owners; what the local engine does for others begins anew."""
        owners = {asked.owner for asked in self._asked.values()} - {self._rank}
        self._asked.clear()
        self._ended.clear()
        self._forget(self._rank)
        for owner in sorted(owners):
            if not self._peers[owner].silent:
                self._send(owner, cancels=True)

    def serve_others(self) -> None:
        """Serve the other ranks, without requests of its own, until all of them have called this as often.

        For work that is shared out beforehand; where tickets are drawn, all ranks poll until the tickets are exhausted.
        Raises LostPeerError that names a rank which is not heard for `stall_s`.
        """
        assert not self._asked, "serve_others while own requests are outstanding"
        self._finished += 1
        for rank in self._peers:
            self._send(rank)
        since = self._now
        while missing := {rank: peer for rank, peer in self._peers.items() if peer.finished < self._finished}:
            steps = self._local.stats.steps
            self.poll()
            silent = [rank for rank, peer in missing.items() if self._now - max(since, peer.heard) > self._stall_s]
            if silent:
                raise self._lost(silent, "which still have work that this rank may be needed for")
            if self._local.stats.steps == steps:
                self._sleep(IDLE_S)

    # ---- whom to ask

    def _send_requests(self, numbered: Iterable[tuple[int, Request]]) -> None:
        groups: dict[int, list[tuple[int, Request]]] = defaultdict(list)
        own_load = Counter(asked.owner for asked in self._asked.values())
        for number, request in numbered:
            owner = self._choose(request, own_load)
            own_load[owner] += 1
            groups[owner].append((number, request))
        for owner, requests in groups.items():
            self._asked |= {number: _Asked(request=request, owner=owner, since=self._now) for number, request in requests}
            self._send(owner, requests=tuple(requests))

    def _choose(self, request: Request, own_load: Mapping[int, int]) -> int:
        """The owner that prompts with this opening go to, unless it has much more to do than another one."""
        owners = self._owners[request.policy]
        peers = {rank: self._peers[rank] for rank in owners if not self._peers[rank].silent}
        load = {rank: own_load[rank] + peer.load * (self._now - peer.heard < FRESH_S) for rank, peer in peers.items()}
        if not load:
            raise self._lost(owners, f"and nobody else serves policy {request.policy!r}")
        home = owners[zlib.crc32(_opening(request)) % len(owners)]
        least = min(load, key=lambda rank: (load[rank], rank))
        return home if home in load and load[home] <= load[least] + IMBALANCE else least

    def _ask_others_than_stalled(self) -> None:
        """Send the requests of owners that have been silent for too long to others."""
        waits = {number: asked for number, asked in self._asked.items() if asked.owner != self._rank}
        stalled = {
            asked.owner for asked in waits.values()
            if self._now - max(asked.since, self._peers[asked.owner].heard) > self._stall_s
        }  # fmt: skip
        if stalled:
            for owner in stalled:
                self._peers[owner].silent = True
            self._send_requests((number, asked.request) for number, asked in waits.items() if asked.owner in stalled)

    def _lost(self, ranks: Sequence[int], why: str) -> LostPeerError:
        names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        return LostPeerError(
            f"rank {self._rank} has heard nothing from {names} for rollout.stall_s={self._stall_s:g} s, {why}; "
            f"see the output of {names}; raise rollout.stall_s where a rank is slow"
        )

    # ---- messages

    def _send(
        self, target: int, *, cancels: bool = False, requests: Iterable[tuple[int, Request]] = (),
        completions: Iterable[tuple[int, Completion]] = (),
    ) -> None:  # fmt: skip
        load = sum(serving.source != target for serving in self._serving.values())
        frame = Frame(
            epoch=self._epoch, load=load, finished=self._finished, cancels=cancels, requests=tuple(requests),
            completions=tuple(completions),
        )  # fmt: skip
        payload = encode(frame)
        self._transport.send(target, payload)
        self._peers[target].told = self._looked
        traffic = self._traffic
        self._traffic = replace(
            traffic, frames_sent=traffic.frames_sent + 1, bytes_sent=traffic.bytes_sent + len(payload)
        )  # fmt: skip

    def _read(self, source: int, payload: bytes) -> None:
        frame, peer, traffic = decode(payload, source), self._peers[source], self._traffic
        self._traffic = replace(
            traffic, frames_received=traffic.frames_received + 1, bytes_received=traffic.bytes_received + len(payload)
        )
        peer.heard, peer.load, peer.silent, peer.finished = self._now, frame.load, False, frame.finished
        if frame.cancels:
            self._forget(source)
        self._accept(source, frame.epoch, frame.requests)
        for number, completion in frame.completions:
            if self._asked.pop(number, None) is not None:  # else cancelled, or answered by another owner first
                self._ended.append((number, completion))

    def _beat(self) -> None:
        """A sign of life to those whose requests are here, or who wait for this rank to finish."""
        waiting = {serving.source for serving in self._serving.values()} | {source for _, source, _ in self._early}
        waiting |= {rank for rank, peer in self._peers.items() if peer.finished > self._finished}
        for rank in sorted(waiting - {self._rank}):
            if self._looked - self._peers[rank].told >= BEAT_S:
                self._send(rank)

    # ---- the local engine

    def _queue(self, numbered: Iterable[tuple[int, Request]], inner: Iterable[int]) -> None:
        """Note own requests that the local engine has."""
        for (number, request), own in zip(numbered, inner, strict=True):
            self._asked[number] = _Asked(request=request, owner=self._rank, since=self._now)
            self._serving[own] = _Serving(source=self._rank, number=number, request=request)

    def _accept(self, source: int, epoch: int, requests: tuple[tuple[int, Request], ...]) -> None:
        """Queue another rank's requests; those that cannot be served are answered with the reason."""
        if requests and epoch > self._epoch:
            self._early.append((epoch, source, requests))
            return
        refused: list[tuple[int, Completion]] = []
        for number, request in requests:
            try:
                self._check(request, epoch)
                own = self._local.submit([request])[0]
            except RolloutError as error:
                refused.append((number, self._failed(str(error))))
            else:
                self._serving[own] = _Serving(source=source, number=number, request=request)
        if refused:
            self._send(source, completions=refused)

    def _check(self, request: Request, epoch: int) -> None:
        if epoch < self._epoch:
            raise RolloutError(f"weights were loaded {self._epoch} times here, but {epoch} times where the request comes from")
        if request.policy not in self._own:
            raise RolloutError(f"policy {request.policy!r} is not served here; expected one of {sorted(self._own)}")

    def _failed(self, error: str) -> Completion:
        return Completion(token_ids=(), logprobs=(), text="", finish="error", error=f"rank {self._rank}: {error}")

    def _work(self) -> None:
        """Let the local engine work, and hand out what has ended. When it breaks down, those who wait for it are told."""
        if not self._serving:
            return
        try:
            ended = self._local.poll()
        except RolloutError as error:
            failed = self._failed(str(error))
            self._answer([(serving, failed) for serving in self._serving.values() if serving.source != self._rank])
            self._serving.clear()
            raise
        self._answer([(self._serving.pop(own), completion) for own, completion in ended])

    def _answer(self, ended: Sequence[tuple[_Serving, Completion]]) -> None:
        groups: dict[int, list[tuple[int, Completion]]] = defaultdict(list)
        for serving, completion in ended:
            if serving.source == self._rank:
                del self._asked[serving.number]
                self._ended.append((serving.number, completion))
                continue
            if completion.finish == "error" and not completion.error.startswith(f"rank {self._rank}: "):
                completion = replace(completion, error=f"rank {self._rank}: {completion.error}")
            groups[serving.source].append((serving.number, completion))
        for source, completions in groups.items():
            self._send(source, completions=completions)

    def _forget(self, source: int) -> None:
        """Drop a rank's requests. An engine forgets all or nothing, so those of other ranks begin anew, under their seeds."""
        self._early = [early for early in self._early if early[1] != source]
        if source != self._rank and all(serving.source != source for serving in self._serving.values()):
            return
        kept = [serving for serving in self._serving.values() if serving.source != source]
        self._local.cancel()
        inner = self._local.submit([serving.request for serving in kept]) if kept else []
        self._serving = dict(zip(inner, kept, strict=True))


def _opening(request: Request) -> bytes:
    """Policy and the tokens before the first that an agent wrote: the same for all turns and siblings of a question."""
    length = request.prompt_spans[0][1] if request.prompt_spans else len(request.prompt_ids)
    return request.policy.encode() + np.array(request.prompt_ids[:length], np.int32).tobytes()
