"""Ranks that serve together: each has a part of every layer, and of the keys and values; one of them plays for all.

The first rank of a group leads: it takes episodes, and tells the others what its engine is asked. They follow: they ask the
same of theirs, which meet its own in every layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from mas_hpc.distributed.tensor_layers import TensorGroup
from mas_hpc.errors import LostPeerError, MasHpcError, RunStopped
from mas_hpc.rollout import frames
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, RolloutStats, Weights

BEAT_S = 10.0
"""A leader that has nothing to do says so that often: a follower would give it up after distributed.world's timeout."""
Said = TypeVar("Said")
_SUBMIT, _POLL, _CANCEL, _BEAT, _DONE, _STOPPED, _FAILED = b"spcbdxf"


class TensorEngine(RolloutEngine):
    """The engine of this rank's part of the models, `local`, whose every step is a collective of the group.

    `load` and `sleep` are called by all ranks of the group; everything else by the leader alone, in work that is `led`. `local`
    must do the same on every rank that is told the same: it may depend on no clock and on nothing that is drawn anew.
    Example: TensorEngine(NativeEngine(model, tokenizer, tensor=group), group).led(work, str, str)
    """

    def __init__(
        self, local: RolloutEngine, group: TensorGroup, *, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._local, self._group, self._clock = local, group, clock
        self._num_outstanding = 0
        self._told_s = clock()
        self._cancels = False

    @property
    def stats(self) -> RolloutStats:
        """Totals of the local engine, which are those of every rank of the group."""
        return self._local.stats

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that plays."""
        return self._group.rank == 0

    def led(self, work: Callable[[], Said], encode: Callable[[Said], str], decode: Callable[[str], Said]) -> Said:
        """What `work` gives on the leader, on every rank of the group; the others follow its engine meanwhile. Collective.

        Raises RunStopped on all ranks when it does on the leader, LostPeerError on the others when the leader cannot go on.
        """
        if not self.leads:
            return decode(self._follow())
        try:
            found = work()
        except MasHpcError as error:
            with suppress(RuntimeError):  # who hears nothing has ended, and says why itself
                self._tell(_STOPPED if isinstance(error, RunStopped) else _FAILED, str(error).encode())
            raise
        self._tell(_DONE, encode(found).encode())
        return found

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """See RolloutEngine. On every rank of the group."""
        return self._local.load(version=version, weights=weights)

    def sleep(self) -> None:
        """See RolloutEngine. On every rank of the group."""
        self._local.sleep()

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """See RolloutEngine."""
        numbers = self._local.submit(requests)  # what it refuses, nobody hears of
        self._num_outstanding += len(numbers)
        if numbers:
            self._tell(_SUBMIT, frames.encode(frames.Frame(epoch=0, load=0, requests=tuple(enumerate(requests)))))
        return numbers

    def poll(self) -> list[tuple[int, Completion]]:
        """See RolloutEngine."""
        if not self._num_outstanding:
            if self._clock() - self._told_s >= BEAT_S:
                self._tell(_BEAT)
            return []
        self._tell(_POLL)
        ended = self._local.poll()
        self._num_outstanding -= len(ended)
        return ended

    def cancel(self) -> None:
        """See RolloutEngine. The others hear it with what they are told next: they may be in a step that was interrupted."""
        self._local.cancel()
        self._num_outstanding, self._cancels = 0, True

    def _tell(self, what: int, data: bytes = b"") -> None:
        if self._cancels:
            self._cancels = False
            self._group.first_bytes(bytes([_CANCEL]))
        self._group.first_bytes(bytes([what]) + data)
        self._told_s = self._clock()

    def _follow(self) -> str:
        while True:
            told = self._group.first_bytes(b"")
            what, data = told[0], told[1:]
            if what == _SUBMIT:
                self._local.submit([request for _, request in frames.decode(data, source=0).requests])
            elif what == _POLL:
                self._local.poll()
            elif what == _CANCEL:
                self._local.cancel()
            elif what == _DONE:
                return data.decode()
            elif what == _STOPPED:
                raise RunStopped(data.decode())
            elif what == _FAILED:
                raise LostPeerError(f"the rank that leads this one's tensor group cannot go on: {data.decode()}")
