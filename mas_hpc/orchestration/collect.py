"""Many episodes at once: each asks who speaks next as soon as it is answered, and the engine serves whatever is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mas_hpc.errors import MasHpcError
from mas_hpc.orchestration.episode import Play, Steps, play
from mas_hpc.orchestration.events import InOrder, Jobs, Schedule, drive
from mas_hpc.rollout.engine import RolloutEngine
from mas_hpc.types import Task, Trace, Turn


def collect(
    engine: RolloutEngine, tasks: Sequence[Task], how: Play, *, max_live: int, schedule: Schedule = "events",
    jobs: Jobs | None = None, on_trace: Callable[[Trace], None] = lambda trace: None, starts: Sequence[Sequence[Turn]] = (),
) -> list[Trace]:  # fmt: skip
    """Play `sampling.episodes` of each task, at most `max_live` at a time; the traces of those that were played here, in order.

    A job is one episode: number `e` of task `t` is job t * episodes + e, its trace what `jobs.finish` gets. Without `jobs` all
    are played here. `on_trace` gets each trace that counts as soon as it ends. `starts`, one a task, are committed turns to
    continue from; without them every episode begins at the question. Seeds are named by task and place in the episode, so that
    neither `schedule` nor the order in which the engine answers changes a trace.

    On Ctrl-C, and on an error of ours, the unfinished traces are handed over too (answer and reward None) before it goes on.
    """
    episodes = how.sampling.episodes
    jobs = jobs or InOrder(range(len(tasks) * episodes))
    live: dict[int, list[Turn]] = {}
    traces: dict[int, Trace] = {}

    def begin(job: int) -> Steps[tuple[Turn, ...]]:
        number, repeat = divmod(job, episodes)
        start = tuple(starts[number]) if starts else ()
        live[job] = list(start)
        return play(tasks[number], how, live[job], path=start, origin=origin_of(tasks[number], repeat))

    def end(job: int, path: tuple[Turn, ...]) -> None:
        trace = finish(tasks[job // episodes], how, live.pop(job), path)
        if jobs.finish(job, trace):
            traces[job] = trace
            on_trace(trace)

    try:
        drive(engine, jobs, begin, end, max_live=max_live, schedule=schedule)
    except (KeyboardInterrupt, MasHpcError):
        for job, turns in live.items():
            if turns:
                task = tasks[job // episodes]
                on_trace(Trace(task=task, turns=tuple(turns), step=how.step, label=f"{how.label}:unfinished"))
        raise
    return [traces[job] for job in sorted(traces)]


def origin_of(task: Task, repeat: int) -> str:
    """What the names of an episode's turns begin with."""
    return f"{task.id}#{repeat}/" if repeat else f"{task.id}/"


def finish(task: Task, how: Play, turns: Sequence[Turn], path: Sequence[Turn]) -> Trace:
    """Grade the committed path; turns without a team reward of their own share its outcome."""
    answer = how.team.answer(path)
    outcome = how.judge.outcome(task, answer)
    return Trace(
        task=task, turns=tuple(share_outcome(turn, outcome, how) for turn in turns), answer=answer, reward=outcome,
        step=how.step, label=how.label,
    )  # fmt: skip


def share_outcome(turn: Turn, outcome: float, how: Play) -> Turn:
    """Give a turn that was not valued by continuations the outcome of the committed path as its team reward."""
    if turn.team_reward is not None or turn.counterfactual or turn.reward is None:
        return turn
    return replace(turn, team_reward=outcome, reward=turn.reward + how.sampling.alpha * outcome)
