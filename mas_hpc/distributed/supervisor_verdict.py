"""What the ends of ranks mean, and whether starting them again can help. Pure: nothing is asked of processes or stores."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mas_hpc import exits
from mas_hpc.distributed.heartbeats import Heartbeat, LastError

Verdict = Literal["running", "done", "died", "failed", "broke", "hung", "lost", "stopped"]
"""died: of a signal; failed: would fail again; broke: may not have to (a traceback, a full disk); hung: ended by the watchdog,
or silent; lost: a peer, and nobody knows why; stopped: asked to end, with everything kept."""
_ORDER: tuple[Verdict, ...] = ("failed", "broke", "hung", "lost", "stopped")
"""Of several, the cause comes before its consequences."""
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
"""Signals that a program brings on itself."""
MAX_BACK_OFF_S = 30.0


def judge(codes: Sequence[int | None], *, outlives: bool) -> Verdict:
    """What the ranks' exit codes mean: None still runs, below 0 died of that signal, above 0 as in exits.

    A failure after a death is taken for its consequence. The end of rank 0 is that of the run. `outlives`: whether the others
    can finish the work of one that died.
    """
    ended = {_meaning(code) for code in codes if code is not None and code > 0}
    died = any(code is not None and code < 0 for code in codes)
    if died and (ended or codes[0] not in (None, 0) or not (outlives or codes[0] == 0)):
        return "died"
    for verdict in _ORDER:
        if verdict in ended:
            return verdict
    return "running" if codes[0] is None else "done"


def _meaning(code: int) -> Verdict:
    meanings: dict[int, Verdict] = {
        exits.UNEXPECTED: "broke", exits.NO_DISK: "broke", exits.HUNG: "hung", exits.LOST_PEER: "lost",
        exits.NOT_FINISHED: "stopped",
    }  # fmt: skip
    return meanings.get(code, "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt at a run has ended.

    Example: Ending(verdict="broke", what="rank 1 broke off", causes=frozenset({("ValueError", "learner.py:93", "train", 7)}))
    """

    verdict: Verdict
    what: str
    """Ended it, in words."""
    causes: frozenset[tuple[object, ...]] = frozenset()
    """What would be the same if the fault were in the program or its data; empty for faults that come from outside."""
    silent: frozenset[int] = frozenset()
    """Ranks that were ended because they gave no sign of life."""
    lost: tuple[str, ...] = ()
    """What ranks said that have lost another."""
    has_kept: bool = False
    """Whether the next attempt would start from a later point than this one did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known when an attempt has ended.

    Example: Found(codes=(75, -9), tells_apart=True, stalled=frozenset(), errors=(), heartbeats={})
    """

    codes: Sequence[int | None]
    tells_apart: bool
    """Whether the codes are those of each rank."""
    stalled: frozenset[int]
    """Ranks that were ended because they gave no sign of life."""
    errors: Sequence[LastError]
    heartbeats: Mapping[int, Heartbeat]
    """The last of each rank that gave any."""

    @property
    def lost(self) -> tuple[str, ...]:
        """What ranks said that have lost another."""
        return tuple(error.message for error in self.errors if error.code == exits.LOST_PEER)

    @property
    def has_kept(self) -> bool:
        """Whether a rank has written what the next attempt goes on from."""
        return any(beat.num_kept for beat in self.heartbeats.values())


def explain(verdict: Verdict, found: Found) -> Ending:
    """The verdict in words, and what would be the same if it came back."""
    if verdict == "died":
        return _death(found)
    errors = [error for error in found.errors if error.code != exits.LOST_PEER]
    ranks = [rank for rank, code in enumerate(found.codes) if code]
    words = {
        "failed": f"ranks {ranks} failed; their messages are above",
        "broke": f"ranks {ranks} broke off",
        "hung": "no rank got anywhere",
        "stopped": "asked to end; what there is goes on with --resume",
        "lost": f"ranks {ranks} lost another, which has not said why",
    }.get(verdict, "")
    if verdict == "broke" and errors:
        first = errors[0]
        place = f" ({first.place})" if first.place else ""
        words = f"rank {first.rank} broke off at {first.phase} {first.step}: {first.kind}: {first.message}{place}"
    elif verdict == "failed" and (told := [error for error in errors if _meaning(error.code) == "failed"]):
        words = f"rank {told[0].rank} failed at {told[0].phase} {told[0].step}: {told[0].message}"
    elif verdict == "hung" and errors:
        words = f"{words} at {errors[0].phase} {errors[0].step}"
    causes = frozenset(error.signature for error in errors)
    return Ending(verdict=verdict, what=words, causes=causes, lost=found.lost, has_kept=found.has_kept)


def _death(found: Found) -> Ending:
    died = {rank: name_of(code) for rank, code in enumerate(found.codes) if code is not None and code < 0}
    if found.stalled and (died.keys() <= found.stalled or not found.tells_apart):
        silent = ", ".join(map(str, sorted(found.stalled)))
        return Ending(verdict="hung", what=f"rank {silent} gave no sign of life", silent=found.stalled, has_kept=found.has_kept)
    who = f"rank {', '.join(map(str, died))}" if found.tells_apart else "a rank"
    causes = frozenset(
        (name, beat.phase, beat.step)
        for rank, name in died.items() if name in CRASHES and (beat := found.heartbeats.get(rank))
    )  # fmt: skip
    names = ", ".join(dict.fromkeys(died.values()))
    return Ending(verdict="died", what=f"{who} died of {names}", causes=causes, lost=found.lost, has_kept=found.has_kept)


def name_of(code: int) -> str:
    """The signal that an exit code below 0 means."""
    return signal.Signals(-code).name


class Restarts:
    """Decides after each attempt whether another can help.

    At most `limit` in a row, counted anew after an attempt that has kept something: a run of days meets more faults than one of
    minutes. The same fault at the same step twice in a row is in the program or its data, and no restart helps.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._causes: Collection[tuple[object, ...]] = ()

    def refuse(self, ending: Ending) -> str:
        """Why the ranks are not started again; empty if they are."""
        if ending.has_kept:
            self._used = 0
        same, self._causes = ending.causes.intersection(self._causes), ending.causes
        if same:
            return f"{ending.what}, as before the restart, at the same step: another restart would not help; mend the cause"
        if self._used == self._limit:
            return f"{ending.what}, and the ranks were started {self._used + 1} times in a row without getting further " \
                f"(--max-restarts {self._limit})"  # fmt: skip
        self._used += 1
        return ""

    @property
    def delay_s(self) -> float:
        """Before the restart that was not refused."""
        return min(2.0 ** (self._used - 1), MAX_BACK_OFF_S)

    @property
    def count(self) -> str:
        """Which restart in a row this is."""
        return f"{self._used} of at most {self._limit}"
