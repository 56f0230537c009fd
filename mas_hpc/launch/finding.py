"""What a check has found: of a job before it costs nodes, and of a machine by the doctor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "skipped", "warning", "error"]
STYLES: dict[Verdict, str] = {"error": "red", "warning": "yellow", "ok": "green", "skipped": "dim"}
"""Of each verdict on a screen, the worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's verdict, what it rests on, and what to do about it.

    Example: Finding(name="queue", verdict="ok", evidence="capacity takes 16 nodes for 6:00:00")
    """

    name: str
    """Of the check, such as queue or binding."""
    verdict: Verdict
    """skipped: it makes no sense here, and the evidence says why."""
    evidence: str
    """What was seen, with its value."""
    remedy: str = ""
    """What to change; empty when nothing is wrong."""

    def __post_init__(self) -> None:
        assert self.remedy or self.verdict in ("ok", "skipped"), f"{self.name}: {self.verdict} without a remedy"


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict of all together; skipped when nothing was looked at."""
    seen = {finding.verdict for finding in findings}
    return next((verdict for verdict in STYLES if verdict in seen), "skipped")


def as_table(findings: Sequence[Finding], title: str = "") -> Table:
    """For the user: the worst first, otherwise in the order in which they were found."""
    order = list(STYLES)
    table = Table("check", "verdict", title=title or None, title_justify="left")
    for column in ("evidence", "remedy"):
        table.add_column(column, overflow="fold")
    for finding in sorted(findings, key=lambda finding: order.index(finding.verdict)):
        style = STYLES[finding.verdict]
        table.add_row(finding.name, Text(finding.verdict, style), Text(finding.evidence), Text(finding.remedy))
    return table


def as_records(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """For programs: JSON objects."""
    return [asdict(finding) for finding in findings]
