"""Steps whose loss or gradient is not finite: they are skipped, and after several in a row the last checkpoint counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mas_hpc.errors import RunError

Restore = Callable[[], int | None]
"""Takes weights and optimizer back to the last checkpoint, while the data goes on, and returns that checkpoint's step; None
where there is none. Collective."""


def no_checkpoint() -> None:
    """Restore of a run that keeps none."""


class Guard:
    """Counts the skipped steps of one learner. All ranks see the same norms and losses, so they decide alike."""

    def __init__(self, limit: int, learning_rate: float) -> None:
        """`limit` skipped steps in a row take the weights back; `learning_rate` is what an error advises to lower."""
        self.restore: Restore = no_checkpoint
        self._limit, self._learning_rate = limit, learning_rate
        self.is_skipping = False
        """Whether the last step was skipped: a checkpoint of now would be one that is gone back from, not to."""
        self._in_a_row = 0
        self._restored: int | None = None

    def record(self) -> dict[str, int | None]:
        """What a checkpoint keeps of it."""
        return {"in_a_row": self._in_a_row, "restored": self._restored}

    def restore_record(self, record: Mapping[str, int | None]) -> None:
        """Count on from there."""
        self._in_a_row, self._restored = record["in_a_row"] or 0, record["restored"]

    def took_step(self) -> None:
        """The step was finite."""
        self._in_a_row, self.is_skipping = 0, False

    def skipped(self, found: str) -> bool:
        """The step was not: `found` names its norms and loss. Returns whether weights and optimizer went back.

        Raises RunError after `limit` steps in a row when there is no checkpoint, or the last one has been gone back to before.
        """
        self._in_a_row, self.is_skipping = self._in_a_row + 1, True
        if self._in_a_row < self._limit:
            return False
        in_a_row, self._in_a_row = self._in_a_row, 0
        checkpoint = self.restore()
        if checkpoint is not None and checkpoint != self._restored:
            self._restored = checkpoint
            return True
        reason = (
            "there is no checkpoint to go back to (checkpoint.every)"
            if checkpoint is None
            else f"so it had after the checkpoint of step {checkpoint} once before"
        )
        raise RunError(
            f"{found}: training has diverged {in_a_row} steps in a row, and {reason}; lower the learning rate "
            f"({self._learning_rate:g})"
        )
