"""A store in memory for the product's own code, which writes down what a TCPStore's host would have to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Request:
    """What one call sends to the store.

    Example: Request(messages=1, keys=64, num_bytes=7680)
    """

    messages: int
    """Each waits for an answer, which it has before the next is sent."""
    keys: int
    num_bytes: int
    """Of values, either way."""
    answered: bool = True
    """Nobody waits for `set`: torch's client sends it and goes on."""


class CountedStore(dist.Store):
    """What TCPStore does, at once and without a host; every call leaves its Request in `bill`.

    Waiting for a key that is not there is an error: in one thread nobody else could set it. `sizes` says how large a value of
    a key is where what is stored stands for more. Example: store.add("next", 4) == 4; store.take_bill() == [Request(1, 1, 8)]
    """

    def __init__(self, sizes: Callable[[str], int | None] = lambda key: None) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.bill: list[Request] = []
        self._sizes = sizes

    def take_bill(self) -> list[Request]:
        """What was asked since the last time."""
        bill, self.bill = self.bill, []
        return bill

    def _note(self, messages: int, keys: Sequence[str], values: Sequence[bytes] = (), *, answered: bool = True) -> None:
        num_bytes = 0
        for key, value in zip(keys, values, strict=False):
            size = self._sizes(key)
            num_bytes += len(value) if size is None else size
        self.bill.append(Request(messages, len(keys), num_bytes, answered))

    def set(self, key: str, value: bytes | str) -> None:
        self.values[key] = _bytes(value)
        self._note(1, [key], [self.values[key]], answered=False)

    def get(self, key: str) -> bytes:
        self._note(2, [key], [self.values[key]])  # it waits for the key first
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self.values.get(key, b"0")) + amount
        self.values[key] = str(total).encode()
        self._note(1, [key], [b"12345678"])
        return total

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        expected, desired = _bytes(expected), _bytes(desired)
        there = self.values.get(key)
        if there == expected or (there is None and not expected):
            self.values[key] = desired
        found = self.values.get(key, expected)
        self._note(1, [key, key], [desired, found])
        return found

    def check(self, keys: Sequence[str]) -> bool:
        self._note(1, keys)
        return all(key in self.values for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        missing = [key for key in keys if key not in self.values]
        assert not missing, f"nobody sets {missing[:3]}"
        self._note(1, keys)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        found = [self.values[key] for key in keys]
        self._note(2, keys, found)  # it waits for the keys first
        return found

    def append(self, key: str, value: bytes | str) -> None:
        self.values[key] = self.values.get(key, b"") + _bytes(value)
        self._note(1, [key], [_bytes(value)], answered=False)

    def delete_key(self, key: str) -> bool:
        self._note(1, [key])
        return self.values.pop(key, None) is not None

    deleteKey = delete_key  # under this name torch's PrefixStore looks for it

    def has_extended_api(self) -> bool:
        return True


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
