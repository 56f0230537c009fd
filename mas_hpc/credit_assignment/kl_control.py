"""The coefficient of the KL penalty: fixed, or steered towards a target (Ziegler et al., arXiv 1909.08593, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_ERROR = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class KLController:
    """State of the penalty between batches.

    Example: KLController(coefficient=0.2, target=6.0, horizon=10_000).updated(12.0, 256).coefficient is about 0.201024
    """

    coefficient: float
    target: float | None
    """Wanted KL in nats a sequence; None keeps the coefficient."""
    horizon: float
    """Sequences after which a clipped error has changed the coefficient by about a fifth."""

    def updated(self, kl: float, n: int) -> KLController:
        """After n sequences of mean `kl` (nats a sequence): coefficient * (1 + clip(kl / target - 1, +-0.2) * n / horizon)."""
        if self.target is None:
            return self
        assert MAX_ERROR * n < self.horizon, f"{n} sequences a batch would turn a horizon of {self.horizon} negative"
        error = min(MAX_ERROR, max(-MAX_ERROR, kl / self.target - 1.0))
        return replace(self, coefficient=self.coefficient * (1.0 + error * n / self.horizon))
