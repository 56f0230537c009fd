"""How far the jobs of a run have come, in a file that outlives them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mas_hpc.errors import LaunchError
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.site import Record

State = Literal["running", "finished", "not finished", "failed"]


class Outcome(Record):
    """How far the jobs of a run have come: outcome.json in the job's folder, for the jobs that follow and for the user.

    Example: Outcome(state="not finished", job_id="123.aurora", dropped={"x4117c4s6b0n0": "named by the launcher"})
    """

    state: State
    """running: or ended without a word, as by the scheduler; failed: another job would fail as well."""
    job_id: str = ""
    dropped: dict[str, str] = Field(default_factory=dict)
    """Nodes that were left out, and why."""

    def write(self, plan: JobPlan) -> None:
        """Replace the one that is there, at once."""
        part = plan.folder / "outcome.part"
        part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(plan.folder / "outcome.json")

    @staticmethod
    def read(folder: Path) -> Outcome | None:
        """That of the last job; None before the first has started. Raises LaunchError for what is none."""
        file = folder / "outcome.json"
        if not file.is_file():
            return None
        try:
            return Outcome.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise LaunchError(f"{file}: not of mas-hpc ({' '.join(str(error).split())}); remove it") from None
