"""How many candidates each state gets, and which one the episode continues from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mas_hpc.types import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """group_size=1 samples a path; K > 1 samples the tree of AT-GRPO (arXiv 2510.11062, section 4.1).

    `episodes` of each question are independent of each other: the group of GRPO.

    Example: Sampling(group_size=8, commit="sampled", team_rollouts=1, alpha=0.5, temperature=1.0)
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    group_size: int = 1
    commit: Literal["sampled", "best"] = "sampled"
    alpha: float = 0.0
    team_rollouts: int = 0
    episodes: int = 1

    @property
    def path_only(self) -> Sampling:
        """The same distribution, one candidate a state: how continuations are sampled."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from names and numbers, the same on every rank and in every run."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def choose(siblings: Sequence[Turn], commit: Literal["sampled", "best"], seed: int) -> int:
    """Which sibling is committed: a uniformly random one, or the first of highest reward. Failed ones only if all failed."""
    alive = [i for i, turn in enumerate(siblings) if turn.finish != "error"] or list(range(len(siblings)))
    if commit == "best":
        return max(alive, key=lambda i: (siblings[i].reward or 0.0, -i))
    return alive[derive_seed("commit", seed) % len(alive)]
