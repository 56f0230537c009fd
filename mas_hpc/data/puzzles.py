"""Our own generators: distinct questions that the tiny model can read, drawn without replacement."""

from __future__ import annotations

import math
import random

from mas_hpc.config import AdditionConfig, RingConfig
from mas_hpc.errors import ConfigError
from mas_hpc.types import Task

_WORDS = ("Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def ring_tasks(config: RingConfig) -> list[Task]:
    """num_test + num_train distinct ring puzzles: x1..xn modulo m from the sums s_i = x_i + x_(i+1), x_(n+1) = x1.

    `compact` is the sums, `answer` one solution drawn at random, each a string of n digits; any solution counts.
    Example (n=5, m=4): compact="13130" has the solutions "01230" and "23012".
    Raises ConfigError when fewer distinct questions exist.
    """
    size, modulus = config.num_digits, config.modulus
    shifts = _ring_shifts(size, modulus)
    rng = random.Random(config.seed)
    tasks = []
    for number in _draw(config, modulus**size // len(shifts), rng, f"{size} digits modulo {modulus}"):
        # Solutions of one question differ by a shift; those with a small first digit stand for one question each.
        digits = [number // modulus**place % modulus for place in reversed(range(size))]
        shift = rng.choice(shifts)
        solution = [(digit + (-shift if place % 2 else shift)) % modulus for place, digit in enumerate(digits)]
        tasks.append(_ring_task(solution, modulus))
    return tasks


def _ring_shifts(size: int, modulus: int) -> list[int]:
    """The c for which x1+c, x2-c, x3+c, ... has the same sums as x: all on an even ring, 2c = 0 on an odd one."""
    return [c for c in range(modulus) if size % 2 == 0 or 2 * c % modulus == 0]


def _ring_task(solution: list[int], modulus: int) -> Task:
    size = len(solution)
    sums = [(digit + solution[(place + 1) % size]) % modulus for place, digit in enumerate(solution)]
    pairs = ", ".join(f"x{place + 1}+x{(place + 1) % size + 1}" for place in range(size))
    compact = "".join(map(str, sums))
    question = (
        f"{_WORDS[size - 3]} digits x1 to x{size}, each from 0 to {modulus - 1}, stand on a ring. "
        f"The sums of neighbours {pairs}, taken modulo {modulus}, are {', '.join(map(str, sums))}. "
        f"Find digits that fit (any solution counts) and write them from x1 to x{size} as one string of {size} digits."
    )
    return Task(
        id=f"ring/{size}/{modulus}/{compact}",
        question=question,
        answer="".join(map(str, solution)),
        grader="ring",
        compact=compact,
    )


def addition_tasks(config: AdditionConfig) -> list[Task]:
    """num_test + num_train sums x + y with distinct unordered {x, y}: no y + x leaks from training into the test.

    One form for all models: numbers are written least significant digit first and zero-padded (operands n digits,
    the sum n + 1), in `compact` and `answer` alike, and `question` asks for that form; hence grader "exact".
    Example: 12 + 30 (n=2) has compact="21+03", answer="240". Raises ConfigError when fewer distinct questions exist.
    """
    width = config.num_digits
    operands = 10**width
    rng = random.Random(config.seed)
    tasks = []
    for number in _draw(config, operands * (operands + 1) // 2, rng, f"{width}-digit operands in either order"):
        larger = (math.isqrt(8 * number + 1) - 1) // 2  # pairs are numbered row by row: (0,0), (0,1), (1,1), (0,2), ...
        pair = [number - larger * (larger + 1) // 2, larger]
        rng.shuffle(pair)
        tasks.append(_addition_task(pair[0], pair[1], width))
    return tasks


def _addition_task(x: int, y: int, width: int) -> Task:
    question = (
        f"Add {x} and {y}. Write the sum with its digits in reverse order (units first), "
        f"filled with zeros at the end to {width + 1} digits."
    )
    compact = f"{_reversed(x, width)}+{_reversed(y, width)}"
    return Task(
        id=f"addition/{width}/{x}+{y}",
        question=question,
        answer=_reversed(x + y, width + 1),
        grader="exact",
        compact=compact,
    )


def _reversed(number: int, width: int) -> str:
    return f"{number:0{width}d}"[::-1]


def _draw(config: RingConfig | AdditionConfig, available: int, rng: random.Random, space: str) -> list[int]:
    """Distinct question numbers below `available`."""
    wanted = config.num_test + config.num_train
    if wanted > available:
        raise ConfigError(
            f"data.num_train={config.num_train}, data.num_test={config.num_test}: {wanted} distinct questions wanted, "
            f"but only {available} exist with {space}; ask for at most {available} together, or raise data.num_digits"
            + (" or data.modulus" if isinstance(config, RingConfig) else "")
        )
    return rng.sample(range(available), wanted)
