"""The processes of one attempt: this supervisor's own, in torchrun's environment, or those of an mpiexec, here or on nodes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from mas_hpc.distributed.launchers import ATTEMPT, STORE
from mas_hpc.distributed.supervisor_verdict import Ending
from mas_hpc.errors import LaunchError

POLL_S = 0.2
"""Time between two looks at the ranks' processes."""
GRACE_S = 10.0
"""How long ranks may take to end after rank 0 has, and after each signal that asks them to."""
LOOK_S = 10.0
"""Time between two looks at the memory of ranks: their maps have thousands of lines."""
SHARED = Path("/dev/shm")
"""Where MPICH's ranks of one host share memory (Linux)."""
ADDRESS = "127.0.0.1"
_USAGE = (1, 2)
"""Exit codes of mpiexec that are no numbers of signals: a mistake, or wrong usage."""
_NUM_SIGNALS = 64
SIGNALLED = 128
"""What shells add to the number of the signal that a process died of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is started.

    Example: Launch(job="rollout", command=("python", "-m", "mas_hpc", "rollout", "mas.yaml"), ranks=2, max_restarts=3)
    """

    job: str
    """Name of the job, such as rollout or train."""
    command: tuple[str, ...]
    """Of each rank; the environment tells it which one it is."""
    ranks: int
    max_restarts: int
    """Of all ranks together, in a row without getting further."""
    starter: Literal["torchrun", "mpiexec"] = "torchrun"
    """torchrun: this supervisor starts the ranks, in the environment that torchrun gives; mpiexec: that starts them."""
    shares_layers: bool = False
    """Whether ranks serve a model together (distributed.tensor_parallel): without one of them its partners cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One attempt at a launch.

    Example: Start(plan=plan, port=29500, attempt=0, base={"PATH": "/bin"})
    """

    plan: Launch
    port: int
    """Of the store that the supervisor hosts."""
    attempt: int
    base: Mapping[str, str]
    """The user's environment."""


class Ranks(Protocol):
    """The processes of all ranks."""

    description: str
    """For the user: which processes they are."""

    def codes(self) -> list[int | None]:
        """Exit codes: None still runs, below 0 died of that signal."""
        ...

    def look(self) -> None:
        """Called every POLL_S while they run."""
        ...

    def kill(self, rank: int, *, pid: int | None) -> None:
        """End one that gives no sign of life; `pid` is what it has said of itself, if anything."""
        ...

    def end(self, first: signal.Signals) -> None:
        """Ask those that are left, then tell, then force them; clean up after them."""
        ...


class Nodes(Protocol):
    """Where ranks run, and for how long they may."""

    first_attempt: int
    """Number of the first start of all ranks: above 0 where a job goes on with a run of jobs before it."""

    def start(self, what: Start) -> Ranks:
        """Start all ranks. Raises LaunchError when there is nothing to start them with."""
        ...

    def lost(self) -> bool:
        """Whether whoever starts ranks says that it has lost a node, with whatever exit code."""
        ...

    def replace(self, ending: Ending) -> str:
        """After an attempt that ended early: drop nodes that it has shown to be bad. Why there can be no other, or nothing."""
        ...

    def hurry(self) -> Literal["", "ask", "end"]:
        """Whether there is time; "ask": ranks are asked to end; "end": they have to. Called every POLL_S."""
        ...


class ThisHost:
    """Nodes of a launch on this host alone, which has time."""

    first_attempt = 0

    def start(self, what: Start) -> Ranks:
        """See Nodes."""
        return OwnRanks(what) if what.plan.starter == "torchrun" else MpiRanks(*local_words(what), what.plan.ranks)

    def lost(self) -> bool:
        """See Nodes."""
        return False

    def replace(self, ending: Ending) -> str:
        """See Nodes."""
        return ""

    def hurry(self) -> Literal["", "ask", "end"]:
        """See Nodes."""
        return ""


def local_words(what: Start) -> tuple[Sequence[str], Mapping[str, str]]:
    """Command and environment of an mpiexec of this host."""
    names = {name: value for name, value in what.base.items() if name not in ("RANK", "WORLD_SIZE")}  # torchrun's
    words = [find_mpiexec(what.base), "-n", str(what.plan.ranks), *what.plan.command]
    return words, {"OMP_NUM_THREADS": "1", **names, ATTEMPT: str(what.attempt), STORE: f"{ADDRESS}:{what.port}"}


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, *, port: int, attempt: int) -> dict[str, str]:
    """The variables of one rank, as torchrun would set them; OMP_NUM_THREADS is the user's, if set."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {
        "OMP_NUM_THREADS": "1",
        **base,
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": ADDRESS,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }


class OwnRanks:
    """Ranks that are children of this process. Rank 0 talks to the user itself; lines of the others are marked."""

    def __init__(self, what: Start) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._cleared: set[int] = set()
        try:
            for rank in range(what.plan.ranks):
                self._processes.append(self._start(what, rank))
        except OSError as error:
            end_processes(self._processes, signal.SIGTERM)
            raise LaunchError(f"rank {len(self._processes)} cannot be started: {error.strerror}") from error
        self._readers = [_mark_output(process, rank) for rank, process in enumerate(self._processes) if rank]
        self.description = f"ranks are processes {' '.join(str(process.pid) for process in self._processes)}"

    def codes(self) -> list[int | None]:
        """See Ranks. What a rank has started and left behind is ended as soon as its own end is seen."""
        codes = [process.poll() for process in self._processes]
        for process in self._processes:
            if process.returncode is not None and process.pid not in self._cleared:
                self._cleared.add(process.pid)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own
        return codes

    def look(self) -> None:
        """Nothing to see beside the codes."""

    def kill(self, rank: int, *, pid: int | None) -> None:
        """See Ranks."""
        self._processes[rank].kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a file server dies when that answers
            self._processes[rank].wait(GRACE_S)

    def end(self, first: signal.Signals) -> None:
        """See Ranks; a stopped process hears the last signal only."""
        end_processes(self._processes, first)
        self.codes()
        wait_until(lambda: not any(reader.is_alive() for reader in self._readers), GRACE_S)  # their last words

    @staticmethod
    def _start(what: Start, rank: int) -> subprocess.Popen[str]:
        plan = what.plan
        return subprocess.Popen(
            plan.command,
            env=rank_environment(what.base, rank, plan.ranks, port=what.port, attempt=what.attempt),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank else None,
            stderr=subprocess.STDOUT if rank else None,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )


class MpiRanks:
    """Ranks of an mpiexec, or of what is like it, which ends all of them when one dies.

    MPICH leaves the shared memory of ranks that were killed (/dev/shm/mpich_shm_*); what was seen in the ranks' own maps is
    removed in the end, and nothing else.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], num_ranks: int,
        on_line: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        """`on_line` gets what comes out of it, line by line, stderr too; without, it writes where this process does."""
        self._num_ranks = num_ranks
        self._shared: set[Path] = set()
        self._next_look = 0.0
        try:
            self._process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if on_line else None,
                stderr=subprocess.STDOUT if on_line else None, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"{words[0]}: cannot be started ({error.strerror}); load the module that has it") from error
        self._reader = read_lines(self._process, on_line) if on_line else None
        self.description = f"{Path(words[0]).name} is process {self._process.pid}"

    def codes(self) -> list[int | None]:
        """See Ranks. mpiexec tells one code of all: its own, or a signal's number, to which PALS and srun add 128."""
        code = self._process.poll()
        if code is not None and 0 < code - SIGNALLED <= _NUM_SIGNALS:
            code -= SIGNALLED
        if code is not None and 0 < code <= _NUM_SIGNALS and code not in _USAGE:
            code = -code
        return [code] * self._num_ranks

    def look(self) -> None:
        """Note the shared memory that the ranks map: whenever there is some until it is seen, then every LOOK_S."""
        if time.monotonic() >= self._next_look if self._shared else any(SHARED.glob("mpich_shm_*")):
            self._note_shared()
            self._next_look = time.monotonic() + LOOK_S

    def _note_shared(self) -> None:
        for pid in descendants(self._process.pid):
            self._shared |= mpich_segments(pid)

    def kill(self, rank: int, *, pid: int | None) -> None:
        """See Ranks. One that has said nothing takes all with it."""
        if pid is not None and pid in descendants(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        else:
            self._process.kill()

    def end(self, first: signal.Signals) -> None:
        """See Ranks."""
        self._note_shared()
        end_processes([self._process], first)
        if self._reader:
            self._reader.join(GRACE_S)  # its last words
        for segment in self._shared:
            segment.unlink(missing_ok=True)


def find_mpiexec(environment: Mapping[str, str]) -> str:
    """The one beside this Python, which belongs to its MPI, or else the first in PATH. Raises LaunchError without any."""
    beside, path = str(Path(sys.executable).parent), environment.get("PATH", "")
    if found := shutil.which("mpiexec", path=beside) or shutil.which("mpiexec", path=path):
        return found
    raise LaunchError(f"--with mpiexec: there is none in {beside} or PATH; install one (pip install 'mas-hpc[mpich]')")


def descendants(pid: int) -> Iterator[int]:
    """Processes that this one, and those, have started (Linux)."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(word) for word in children.read_text().split()]
        except OSError:  # it has ended meanwhile
            continue
        for child in found:
            yield child
            yield from descendants(child)


def mpich_segments(pid: int) -> set[Path]:
    """Files of MPICH's shared memory that a process maps."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended meanwhile
        return set()
    return {Path(line.split()[-1]) for line in maps.splitlines() if " /dev/shm/mpich_shm_" in line and not line.endswith(")")}


def end_processes(processes: Sequence[subprocess.Popen[str]], first: signal.Signals) -> None:
    """Ask, then tell, then force those that still run."""
    for number in dict.fromkeys((first, signal.SIGTERM, signal.SIGKILL)):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        wait_until(lambda: all(process.poll() is not None for process in processes), GRACE_S)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Return when it holds, or when the time is over."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(POLL_S)


def _mark_output(process: subprocess.Popen[str], rank: int) -> threading.Thread:
    """Pass on what a rank says; the thread ends when it, and whoever it has started, says no more."""
    assert process.stdout
    reader = threading.Thread(target=_mark_lines, args=(process.stdout, f"[rank {rank}] "), daemon=True)
    reader.start()
    return reader


def read_lines(process: subprocess.Popen[str], on_line: Callable[[str], object]) -> threading.Thread:
    """Hand on what a process says; the thread ends when it, and whoever it has started, says no more."""

    def read(lines: IO[str]) -> None:
        for line in lines:
            on_line(line.rstrip("\n"))

    assert process.stdout
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    return reader


def _mark_lines(lines: IO[str], mark: str) -> None:
    for line in lines:
        sys.stderr.write(f"{mark}{line}")
