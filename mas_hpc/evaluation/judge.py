"""Judging model text in a child process, because the libraries that do it can hang or crash on very short text.

An answer such as 9^{9^{9^9}} keeps sympy busy for ever, and math-verify's own time limit needs the main thread of a
POSIX process. Here the child limits itself with faulthandler's watchdog, which needs neither, and the parent reads
end-of-file. This file is also the child's program; run by path, it imports nothing of ours.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO


class JudgeError(Exception):
    """The reference, not the model's text, cannot be judged."""


class Judge:
    """The child process: started at the first question, again after it ended itself, and ended with the parent."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        """`timeout_s`: wall time for one judgement; an honest one takes milliseconds."""
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (ours for life)

    def ask(self, kind: str, reference: str, answer: str, question: str = "") -> bool:
        """Is `answer` right? False when it cannot be judged in time. Raises JudgeError for an unreadable reference."""
        request = json.dumps([kind, reference, answer, question])
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                pipe = subprocess.PIPE
                command = [sys.executable, __file__, str(self._timeout_s)]
                self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, encoding="ascii")
            assert self._child.stdin is not None and self._child.stdout is not None
            self._child.stdin.write(request + "\n")
            self._child.stdin.flush()
            ready = self._child.stdout.readline().strip()
            verdict = self._child.stdout.readline().strip() if ready == "ready" else ""
            if ready in ("", "ready") and not verdict:  # end of file: the child is on its way out
                self._child.wait()
        if ready == "ready":
            return verdict == "true"
        raise JudgeError(json.loads(ready) if ready else f"the judging process failed: {self._last_line()}")

    def _last_line(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["no message"])[-1]


def _math(reference: str, answer: str, _question: str) -> Callable[[], bool]:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[object]:
        # As a formula only: math-verify's other reader hands the text to eval.
        return list(parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None))

    gold = read(reference)
    if all(isinstance(reading, str) for reading in gold):  # the text itself, which is all that is left of a non-formula
        raise JudgeError("math-verify cannot read it as a formula")
    return lambda: bool(verify(gold, read(answer), timeout_seconds=None))


def _reasoning_gym(reference: str, answer: str, question: str) -> Callable[[], bool]:
    """`reference` is a task id that data.tasks made: reasoning_gym/<name>/[<setting>=<number>/...]<seed>/<size>/<index>."""
    folder, _, index = reference.rpartition("/")
    entry = _entry(folder, int(index))
    if entry["question"] != question:
        raise JudgeError("reasoning-gym generates another question under this id; use the version that made the tasks")
    return lambda: bool(_entries(folder).score_answer(answer, entry) >= 1.0)


@functools.lru_cache(maxsize=4)
def _entries(folder: str):  # type: ignore[no-untyped-def]  # the library is optional
    _, name, *settings, seed, size = folder.split("/")
    numbers = {key: json.loads(value) for key, value in (setting.split("=") for setting in settings)}
    return importlib.import_module("reasoning_gym").create_dataset(name, seed=int(seed), size=int(size), **numbers)


@functools.lru_cache(maxsize=4096)  # training asks again and again, and some data sets are slow to make an entry
def _entry(folder: str, index: int) -> dict[str, object]:
    entry: dict[str, object] = _entries(folder)[index]
    return entry


def _serve(timeout_s: float) -> None:
    """Answer each request line by "ready" and true | false, or by the JSON text of what is wrong with the reference."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not mix with the replies
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            kind, *arguments = json.loads(line)
            try:
                judge = {"math": _math, "reasoning_gym": _reasoning_gym}[kind](*arguments)
            except JudgeError as error:
                print(json.dumps(str(error)), file=replies, flush=True)
                continue
            print("ready", file=replies, flush=True)
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=nowhere)
            verdict = judge()
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules must not shadow the libraries'
    _serve(float(sys.argv[1]))
