"""What a word with a real TCPStore costs: CPU of the process that hosts it and of those that ask, and words a second.

The host's CPU time a word is what limits a star: its thread serves one word at a time. CPU time is hardly touched by other
load on the machine; words a second are, and are kept to check the simulation against.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np
import torch.distributed as dist
from scaling.counted_store import CountedStore, Request

from mas_hpc.distributed.many_keys import WINDOW

TIMEOUT = timedelta(seconds=120)
CLIENTS = (1, 2, 8, 64)
RECORD_BYTES, RESULT_BYTES, LARGE_BYTES = 120, 3000, 64 << 10
"""A heartbeat; a trace; what makes the cost of bytes visible beside that of the word."""
REPEATS = 3


WORDS: dict[str, Callable[[Any, str], object]] = {
    "add": lambda store, name: store.add("count", 1),
    "set": lambda store, name: store.set(f"beat/{name}", "r" * RECORD_BYTES),
    "get": lambda store, name: store.get("record/0"),
    "check": lambda store, name: store.check(["record/0"]),
    "wait": lambda store, name: store.wait(["record/0"], TIMEOUT),
    "compare_set": lambda store, name: store.compare_set(f"won/{name}", "", "t" * RESULT_BYTES),
    "check_window": lambda store, name: store.check(_window("record")),
    "get_window": lambda store, name: store.multi_get(_window("record")),
    "set_large": lambda store, name: store.set(f"large/{name}", _LARGE),
    "get_large": lambda store, name: store.get("large"),
}
"""Calls of a store, by one of several clients, which has a name."""
_LARGE = "x" * LARGE_BYTES


def _fill(store: Any) -> None:
    for key in _window("record"):
        store.set(key, "r" * RECORD_BYTES)
    store.set("large", _LARGE)


def request_of(word: str) -> Request:
    """What the second such call of a client sends."""
    store = CountedStore()
    _fill(store)
    WORDS[word](store, "0")
    store.take_bill()
    WORDS[word](store, "0")
    (request,) = store.take_bill()
    return request


def _window(name: str) -> list[str]:
    return [f"{name}/{number}" for number in range(WINDOW)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One kind of word from some clients at once.

    Example: Measured(word="add", clients=8, words_per_s=41000.0, host_s=9e-6, client_s=14e-6)
    """

    word: str
    clients: int
    """Threads of one process, each with a connection of its own."""
    words_per_s: float
    host_s: float
    """CPU of the host's process a word."""
    client_s: float
    """CPU of the clients' process a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the host's thread is busy with a request: so long a message, an answer, a key of a message, and a byte.

    Example: Cost(message_s=3e-6, answer_s=5e-6, key_s=2e-7, byte_s=1e-10).of(Request(messages=1, keys=64, num_bytes=7680))
    """

    message_s: float
    answer_s: float
    key_s: float
    byte_s: float

    def of(self, request: Request) -> float:
        """Seconds."""
        message_s = self.message_s + self.answer_s * request.answered + self.key_s * request.keys
        return request.messages * message_s + self.byte_s * request.num_bytes


def fit(rows: Sequence[Measured]) -> Cost:
    """Least squares of the relative error over the kinds of words; no part is below zero."""
    requests = [request_of(row.word) for row in rows]
    design = np.array([[one.messages, one.messages * one.answered, one.messages * one.keys, one.num_bytes] for one in requests])
    host_s = np.array([row.host_s for row in rows])
    parts = np.linalg.lstsq(design / host_s[:, None], np.ones(len(rows)), rcond=None)[0]
    message_s, answer_s, key_s, byte_s = (max(0.0, float(part)) for part in parts)
    return Cost(message_s=message_s, answer_s=answer_s, key_s=key_s, byte_s=byte_s)


def measure(*, num_words: int, clients: Sequence[int] = CLIENTS) -> list[Measured]:
    """Every kind of word from eight clients, the first two kinds from each number of clients; medians of REPEATS."""
    host = dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    _fill(host)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_clients, args=(theirs, host.port), daemon=True)
    process.start()
    cases = [(word, count) for word in ("add", "set") for count in clients if count != 8] + [(word, 8) for word in WORDS]
    try:
        return [_measured(ours, word, count, num_words) for word, count in cases]
    finally:
        ours.send(None)
        process.join()


def _measured(clients: Connection, word: str, count: int, num_words: int) -> Measured:
    runs = []
    for repeat in range(REPEATS + 1):  # the first one makes the connections
        host_start_s = time.process_time()
        clients.send((word, count, num_words if repeat else 10 * count))
        wall_s, client_s, total = clients.recv()
        runs.append((total / wall_s, (time.process_time() - host_start_s) / total, client_s / total))
    rate, host_s, client_s = (median(column) for column in zip(*runs[1:], strict=True))
    return Measured(word=word, clients=count, words_per_s=rate, host_s=host_s, client_s=client_s)


def _clients(orders: Connection, port: int) -> None:
    """In a process of its own: ask as ordered, from as many threads, until told to end."""
    stores: list[dist.TCPStore] = []
    while order := orders.recv():
        word, count, num_words = order
        while len(stores) < count:
            stores.append(dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT, wait_for_workers=False))
        each = max(1, num_words // count)
        threads = [
            threading.Thread(target=_ask, args=(WORDS[word], stores[number], str(number), each)) for number in range(count)
        ]
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        orders.send((time.perf_counter() - start_s, time.process_time() - start_cpu_s, each * count))


def _ask(word: Callable[[Any, str], object], store: Any, name: str, times: int) -> None:
    for _ in range(times):
        word(store, name)
    store.check([name])  # answered after all that came before it: nobody answers a `set`
