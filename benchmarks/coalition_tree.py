"""The coalition tree against naive replays of the plain four-role pipeline: the same values, fewer model calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from statistics import fmean

from planted_cases import MAX_LIVE, collected
from reporting import Row, alternate, cost_row, cpu_seconds

from mas_hpc.credit_assignment.credit import Path
from mas_hpc.credit_assignment.estimate import answered
from mas_hpc.credit_assignment.shapley import exact
from mas_hpc.orchestration.episode import Play, Steps
from mas_hpc.orchestration.events import serve_all
from mas_hpc.orchestration.replay import Counterfactual, continued
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.phases.replays import Game, play_games
from mas_hpc.rollout.engine import RolloutEngine
from mas_hpc.types import Task, Trace, Turn

REPLAYS = 4
MOST_CALLS = 15
"""What a question and replay may cost: one call for every coalition that is not empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What one way of replaying found.

    Example: Replayed(phi=((0.5, 0.0, 0.5, 0.0),), calls=7)
    """

    phi: tuple[tuple[float, ...], ...]
    """Shapley values of the agents, a row a question."""
    calls: int
    """Completions that were sampled, over all questions and replays."""


def by_tree(engine: RolloutEngine, traces: Sequence[Trace], how: Play) -> Replayed:
    """As `mas-hpc credit` replays: pruned, and equal requests once."""
    calls: Counter[str] = Counter()
    steps = []
    for trace in traces:
        path = Path(turns=trace.path, players=tuple(how.team.agents), outcome=trace.reward or 0.0)
        game = Game(task=trace.task, path=path, how=how, value="removal", num_replays=REPLAYS)
        steps.append((trace.task.id, game.credit("shapley")))
    found = play_games(engine, steps, max_live=MAX_LIVE, requests=calls)
    return Replayed(phi=tuple(credit.attribution.phi for credit in found), calls=calls["sampled"])


def coalitions(players: Sequence[str]) -> Iterator[frozenset[str]]:
    """All 2^n."""
    return map(frozenset, chain.from_iterable(combinations(players, size) for size in range(len(players) + 1)))


def naively(engine: RolloutEngine, traces: Sequence[Trace], how: Play) -> Replayed:
    """Every coalition plays every replay for itself: all its agents speak, and nothing is shared."""
    players = tuple(how.team.agents)
    asked = [(trace.task, present, replay) for trace in traces for present in coalitions(players) for replay in range(REPLAYS)]
    games = [unpruned(task, present, replay, how) for task, present, replay in asked]
    ends = serve_all(engine, games, max_live=MAX_LIVE)
    outcomes: dict[tuple[str, frozenset[str]], list[float]] = defaultdict(list)
    for (task, present, _), end in zip(asked, ends, strict=True):
        outcomes[task.id, present].append(how.judge.outcome(task, how.team.answer(end)))
    phi = tuple(
        answered(exact(players), lambda questions, task=trace.task: [fmean(outcomes[task.id, one]) for one in questions]).phi
        for trace in traces
    )
    return Replayed(phi=phi, calls=sum(map(len, ends)))


def unpruned(task: Task, present: frozenset[str], replay: int, how: Play) -> Steps[tuple[Turn, ...]]:
    """The present agents one after the other, under the seeds of the tree."""
    alone = replace(how.team, topology=Pipeline(agents=tuple(name for name in how.team.agents if name in present)))
    return continued(task, replace(how, team=alone), (), origin=f"{task.id}~{replay}/")


def free_zeros(how: Play, trace: Trace) -> float:
    """Share of the coalitions in which nobody answers that cost no call."""
    answering = {name for name, agent in how.team.agents.items() if agent.role.produces == "answer"}
    worthless = [present for present in coalitions(tuple(how.team.agents)) if not present & answering]
    counterfactual = Counterfactual(task=trace.task, path=trace.path, how=how, value="removal", num_replays=1)
    return fmean(next(counterfactual.outcome(present, 0), None) is None for present in worthless)


def tree_rows(engine: RolloutEngine, tasks: Sequence[Task], how: Play) -> list[Row]:
    """Values, model calls and CPU seconds of both."""
    plain = replace(how, team=replace(how.team, topology=Pipeline(agents=tuple(how.team.agents))))
    traces = collected(engine, tasks, plain)
    ours, theirs = by_tree(engine, traces, plain), naively(engine, traces, plain)
    equal = fmean(a == b for a, b in zip(ours.phi, theirs.phi, strict=True))
    zeros = free_zeros(plain, traces[0])
    seconds = alternate(
        [
            lambda: cpu_seconds(lambda: by_tree(engine, traces, plain)),
            lambda: cpu_seconds(lambda: naively(engine, traces, plain)),
        ]
    )
    case, peer, number = f"coalition tree, {len(traces)} questions, {REPLAYS} replays", "naive replays", len(traces) * REPLAYS
    return [
        Row(case=case, metric="share of questions with equal phi", ours=equal, peer=peer, theirs=1.0, ratio=equal, target=1.0),
        cost_row(
            case=case, metric="model calls per question and replay", ours=ours.calls / number, peer=peer,
            theirs=theirs.calls / number, target=theirs.calls / number / MOST_CALLS,
        ),
        Row(
            case=case, metric="share of coalitions without an answer that cost no call", ours=zeros,
            peer=peer, theirs=0.25, ratio=zeros / 0.25, target=4.0,
        ),
        cost_row(case=case, metric="cpu_s", ours=seconds[0], peer=peer, theirs=seconds[1], target=1.0),
    ]  # fmt: skip
