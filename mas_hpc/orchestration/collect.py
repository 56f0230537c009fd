"""Many episodes at once: every live one is asked who speaks next, and all requests go to the engine together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mas_hpc.errors import MasHpcError
from mas_hpc.orchestration.episode import Play, Result, Steps, parallel, play
from mas_hpc.rollout.engine import RolloutEngine
from mas_hpc.types import Task, Trace, Turn


def collect(
    engine: RolloutEngine, tasks: Sequence[Task], how: Play, *, step: int = 0, label: str = "", max_live: int,
    on_trace: Callable[[Trace], None], starts: Sequence[Sequence[Turn]] = (),
) -> list[Trace]:  # fmt: skip
    """Play `sampling.episodes` of each task, at most `max_live` at a time; `on_trace` gets each trace as soon as it ends.

    `starts`, one a task, are committed turns to continue from; without them every episode begins at the question.

    On Ctrl-C, and on an error of ours, the unfinished traces are handed over too (answer and reward None) before it goes on.
    """
    repeats = range(how.sampling.episodes)
    origins = [f"{task.id}#{repeat}/" if repeat else f"{task.id}/" for task in tasks for repeat in repeats]
    starts = [start for start in starts or [()] * len(tasks) for _ in repeats]
    tasks = [task for task in tasks for _ in repeats]
    turns = [list(start) for start in starts]
    finished: dict[int, Trace] = {}

    def end(number: int, path: tuple[Turn, ...]) -> None:
        trace = finish(tasks[number], how, turns[number], path, step=step, label=label)
        finished[number] = trace
        on_trace(trace)

    games = [
        play(task, how, turns[number], path=tuple(starts[number]), origin=origins[number]) for number, task in enumerate(tasks)
    ]
    try:
        run(engine, parallel(games, max_live=max_live, on_end=end))
    except (KeyboardInterrupt, MasHpcError):
        for number, task in enumerate(tasks):
            if turns[number] and number not in finished:
                on_trace(Trace(task=task, turns=tuple(turns[number]), step=step, label=f"{label}:unfinished"))
        raise
    return [finished[number] for number in range(len(tasks))]


def finish(task: Task, how: Play, turns: Sequence[Turn], path: Sequence[Turn], *, step: int, label: str) -> Trace:
    """Grade the committed path; turns without a team reward of their own share its outcome."""
    answer = how.team.answer(path)
    outcome = how.judge.outcome(task, answer)
    return Trace(
        task=task, turns=tuple(share_outcome(turn, outcome, how) for turn in turns), answer=answer, reward=outcome,
        step=step, label=label,
    )  # fmt: skip


def share_outcome(turn: Turn, outcome: float, how: Play) -> Turn:
    """Give a turn that was not valued by continuations the outcome of the committed path as its team reward."""
    if turn.team_reward is not None or turn.counterfactual or turn.reward is None:
        return turn
    return replace(turn, team_reward=outcome, reward=turn.reward + how.sampling.alpha * outcome)


def run(engine: RolloutEngine, steps: Steps[Result]) -> Result:
    """Serve a generator's requests until it returns."""
    try:
        requests = next(steps)
        while True:
            requests = steps.send(engine.generate(requests))
    except StopIteration as end:
        return end.value
