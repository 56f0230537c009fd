"""The result of a run in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mas_hpc.evaluation.metrics import PairedTest, paired_test
from mas_hpc.evaluation.report.run_folder import MetricLine, Paired, Results, Row

LEVEL = 0.05
"""Differences with a greater p-value are called unclear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A row beside the team, trained if it was, at the same temperature."""

    row: Row
    difference: float | None
    """Accuracy of the row minus the team's; None for the team itself or without one."""
    test: PairedTest | None
    """None when the two were not measured on the same questions."""
    best: bool
    """No row of its temperature is more accurate."""


def compare(rows: Sequence[Row]) -> tuple[Comparison, ...]:
    """Every row beside the team, grouped by temperature (greedy first), otherwise in order."""
    ordered = sorted(rows, key=lambda row: -1.0 if row.temperature is None else row.temperature)
    teams = {row.temperature: row for row in reversed(_teams(ordered))}
    best = {row.temperature: max(r.accuracy for r in rows if r.temperature == row.temperature) for row in rows}
    return tuple(_against(row, teams.get(row.temperature), best[row.temperature]) for row in ordered)


def sentences(results: Results) -> tuple[str, ...]:
    """What training changed, then who wins, for each temperature."""
    return (*map(_gain, results.paired), *_winners(results.rows))


def held_out(metrics: Sequence[MetricLine]) -> tuple[str, ...]:
    """What training changed on held-out data, for runs without an evaluation of the team."""
    looks = [line for line in metrics if line.phase == "train/held_out"]
    if len(looks) < 2:
        return ()
    first, last = looks[0], looks[-1]
    changed = [
        f"{name} {first.values[name]:.3f} -> {value:.3f}"
        for name, value in last.values.items()
        if name in ("loss", "f1", "accuracy", "rewards/accuracies", "rewards/margins") and name in first.values
    ]
    return (f"Held-out data, before training and after {last.step} steps: {', '.join(changed)}.",)


def setting(temperature: float | None) -> str:
    """How completions were drawn, as the start of a sentence."""
    if temperature is None:
        return "Overall"
    return "Greedy" if temperature == 0 else f"At temperature {temperature:g}"


def p_text(p_value: float) -> str:
    """p = 0.012, or p = 3e-09 when small."""
    return f"p = {p_value:.2g}"


def _against(row: Row, team: Row | None, best: float) -> Comparison:
    if team is None or team is row:
        return Comparison(row=row, difference=None, test=None, best=row.accuracy == best)
    same_questions = row.right and len(row.right) == len(team.right)
    test = paired_test(team.right, row.right) if same_questions else None
    return Comparison(row=row, difference=row.accuracy - team.accuracy, test=test, best=row.accuracy == best)


def _gain(paired: Paired) -> str:
    clear = paired.p_value < LEVEL
    verb = "makes no clear difference to" if not clear else "lifts" if paired.difference > 0 else "lowers"
    return (
        f"{setting(paired.temperature)}, training {verb} the team's accuracy: {100 * paired.difference:+.1f} points "
        f"(95% interval {100 * paired.low:+.1f} to {100 * paired.high:+.1f}, {p_text(paired.p_value)}; "
        f"{paired.wins} questions won, {paired.losses} lost)."
    )


def _teams(rows: Sequence[Row]) -> list[Row]:
    """The team's rows: trained if it was trained, else as it was measured."""
    return [row for row in rows if row.phase == "after"] or [row for row in rows if row.phase != "control"]


def _winners(rows: Sequence[Row]) -> list[str]:
    controls = [row for row in rows if row.phase == "control"]
    return [_winner(team, max(controls, key=lambda row: row.accuracy)) for team in _teams(rows) if controls]


def _winner(team: Row, rival: Row) -> str:
    """The team against its best control, whatever temperature that was sampled at."""
    gap = 100 * (team.accuracy - rival.accuracy)
    test = paired_test(rival.right, team.right) if rival.right and len(rival.right) == len(team.right) else None
    ours, theirs = f"the team ({_cost(team)})", f"{rival.name}{_sampled_at(team, rival)} ({_cost(rival)})"
    proof = f", {p_text(test.p_value)}" if test else ""
    if test and test.p_value >= LEVEL:
        apart = f"cannot be told apart ({gap:+.1f} points{proof})"
        return f"{setting(team.temperature)}, {ours} and its best control, {theirs}, {apart}."
    verb = "beats" if gap > 0 else "loses to" if gap < 0 else "equals"
    return f"{setting(team.temperature)}, {ours} {verb} its best control, {theirs}: {gap:+.1f} points{proof}."


def _cost(row: Row) -> str:
    tokens = f", {row.tokens_per_question:.0f} tokens a question" if row.tokens_per_question is not None else ""
    return f"{row.accuracy:.1%}{tokens}"


def _sampled_at(team: Row, rival: Row) -> str:
    return f" at temperature {rival.temperature:g}" if rival.temperature and rival.temperature != team.temperature else ""
