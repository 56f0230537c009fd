"""Cases of the planted-fault benchmark: a team, an engine that misbehaves, its traces, and who is to blame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import planted_teams
from planted_teams import HEALTHY, PlantedTeam, answer_text, exact_credit, prefix_chance, verdict_text
from reporting import ROOT
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from mas_hpc.config_file import load_config
from mas_hpc.credit_assignment.error_localization import Fault, fault_by_arithmetic
from mas_hpc.distributed.world import World
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, fill
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.phases.training import warm_up
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, RolloutStats, Weights
from mas_hpc.run import Run, build
from mas_hpc.types import Task, Trace, Turn

NUM_TRACES = 32
"""Traces of each scripted team, and right traces in which a message is corrupted."""
NUM_FAILED = 16
"""Failed traces that a scripted team with a culprit has at the least: further ones are added to its first traces."""
NUM_TINY = 16
"""Failed traces of each tiny team."""
NUM_ATTEMPTS = 40
"""How often a corrupted trace is played on in search of a wrong end."""
MAX_LIVE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Traces whose credit is scored.

    Example: Case(name="saboteur", kind="scripted", how=play, engine=engine, traces=traces, culprits=("reviser",) * 40)
    """

    name: str
    kind: str
    """scripted, corrupted or tiny."""
    how: Play
    engine: RolloutEngine
    traces: tuple[Trace, ...]
    """As they came, the first NUM_TRACES of them; any after these were chosen because they failed."""
    culprits: tuple[str, ...] = ()
    """The agent at fault, one a trace; empty where nobody is."""
    places: tuple[int, ...] = ()
    """The corrupted message, one a trace; empty where no single message is."""
    truth: Mapping[str, float] | None = None
    """Analytic Shapley values of the agents under removal; None where they are not known."""
    score: Callable[[Sequence[Turn], int], float] | None = None
    """Of a message of a path: what an oracle process reward model says; None without one."""
    check: Callable[[Sequence[Turn]], Fault | None] | None = None
    """The first error that executable checks find; None where texts cannot be checked."""
    planted: PlantedTeam | None = None
    """The scripts' skills; None where a model speaks."""

    @property
    def players(self) -> tuple[str, ...]:
        """All agents."""
        return tuple(self.how.team.agents)


def collected(engine: RolloutEngine, tasks: Sequence[Task], how: Play, starts: Sequence[Sequence[Turn]] = ()) -> list[Trace]:
    """One trace a task."""
    return collect(engine, tasks, how, max_live=MAX_LIVE, on_trace=lambda trace: None, starts=starts)


# ---- scripted teams


def scripted(planted: PlantedTeam, tokenizer: PreTrainedTokenizerFast) -> Case:
    """The first traces of a team, right and wrong; where somebody is at fault, some more failed ones."""
    team, engine = planted_teams.build_team(planted, tokenizer), planted_teams.build_engine(planted, tokenizer)
    how = Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=0)
    traces = collected(engine, planted_teams.tasks(NUM_TRACES), how)
    if planted.culprit:
        more = collected(engine, planted_teams.tasks(NUM_TRACES * 4, start=NUM_TRACES), how)
        missing = max(0, NUM_FAILED - sum(trace.reward == 0.0 for trace in traces))
        traces += [trace for trace in more if trace.reward == 0.0][:missing]
    return Case(
        name=planted.name, kind="scripted", how=how, engine=engine, traces=tuple(traces), planted=planted,
        culprits=(planted.culprit,) * len(traces) if planted.culprit else (),
        truth=exact_credit(planted, "removal"), score=oracle_score(planted), check=fault_by_arithmetic,
    )  # fmt: skip


def oracle_score(planted: PlantedTeam) -> Callable[[Sequence[Turn], int], float]:
    """A process reward model that knows the probability of success after every message."""
    return lambda path, place: prefix_chance(planted, path, place + 1)


# ---- one corrupted message in a right trace


def corrupted(tokenizer: PreTrainedTokenizerFast) -> Case:
    """Right traces of the healthy team, in turn with the solver's, critic's or reviser's message made wrong.

    The others play on from it as they do; of the ends that they come to the first wrong one is taken.
    """
    base = scripted(HEALTHY, tokenizer)
    right = [trace for trace in collected(base.engine, planted_teams.tasks(6 * NUM_TRACES), base.how) if trace.reward == 1.0]
    starts = {trace.task: corrupted_start(base.how, trace, number % 3) for number, trace in enumerate(right)}
    starts = {task: start for task, start in starts.items() if start}
    failed: dict[Task, Trace] = {}
    for attempt in range(1, 1 + NUM_ATTEMPTS):
        waiting = [task for task in starts if task not in failed]
        ends = collected(base.engine, waiting, replace(base.how, seed=attempt), [starts[task] for task in waiting])
        failed |= {trace.task: trace for trace in ends if trace.reward == 0.0}
    chosen = [task for task in starts if task in failed][:NUM_TRACES]
    places = tuple(len(starts[task]) - 1 for task in chosen)
    return replace(
        base, name="corrupted message", kind="corrupted", traces=tuple(failed[task] for task in chosen), places=places,
        culprits=tuple(starts[task][-1].agent for task in chosen), truth=None,
    )  # fmt: skip


def corrupted_start(how: Play, trace: Trace, place: int) -> tuple[Turn, ...]:
    """The path up to a message that was right and is made wrong; empty if it was not right."""
    turn, before = trace.path[place], trace.path[:place]
    if turn.truth is not (True if turn.verdict is None else turn.verdict):
        return ()
    if turn.verdict is not None:
        text = verdict_text(rejects=turn.verdict)
    else:
        _, left, right = planted_teams.read_prompt(trace.task.question)
        text = answer_text(left, right, is_right=False, rng=Random(turn.seed))
    ids = how.team.template.write(text)
    wrong = fill(turn, Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), text=text, finish="stop"), how.team)
    return (*before, how.judge.score(trace.task, how.team, before, wrong))


# ---- a tiny model whose completions are intervened on


class CorruptingEngine(RolloutEngine):
    """Another engine, one of whose policies says the wrong thing; implements RolloutEngine.

    Answers get one digit moved by 1 modulo `modulus`, verdicts the other sign.
    Example: CorruptingEngine(engine, "critic", tokenizer, modulus=4)
    """

    def __init__(self, engine: RolloutEngine, culprit: str, tokenizer: PreTrainedTokenizerFast, *, modulus: int) -> None:
        self._engine = engine
        self._culprit = culprit
        self._tokenizer = tokenizer
        self._modulus = modulus
        self._asked: dict[int, Request] = {}

    @property
    def stats(self) -> RolloutStats:
        """As the engine."""
        return self._engine.stats

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """As the engine."""
        return self._engine.load(version=version, weights=weights)

    def cancel(self) -> None:
        """As the engine."""
        self._asked.clear()
        self._engine.cancel()

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """As the engine."""
        numbers = self._engine.submit(requests)
        self._asked |= zip(numbers, requests, strict=True)
        return numbers

    def poll(self) -> list[tuple[int, Completion]]:
        """As the engine, the culprit's completions changed after they were sampled."""
        served = [(number, self._asked.pop(number), completion) for number, completion in self._engine.poll()]
        return [
            (number, self._changed(request, one) if request.policy == self._culprit else one) for number, request, one in served
        ]

    def _changed(self, request: Request, completion: Completion) -> Completion:
        text = corrupted_text(completion.text, Random(request.seed), self._modulus)
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return replace(completion, text=text, token_ids=ids)


def corrupted_text(text: str, rng: Random, modulus: int) -> str:
    """The other verdict, or an answer with one digit moved; what is neither stays."""
    if text[-1:] in ("+", "-"):
        return text[:-1] + "-+"[text[-1] == "-"]
    if not text.isdigit():
        return text
    place = rng.randrange(len(text))
    return f"{text[:place]}{(int(text[place]) + 1) % modulus}{text[place + 1 :]}"


def tiny_run(folder: Path, steps: int) -> Run:
    """The quickstart's model after a short warm start."""
    overrides = [f"runs_dir={folder}", "name=credit", f"warm_start.steps={steps}"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    return warm_up(build(config, World(), Console(quiet=True)))


def tiny_play(run: Run) -> Play:
    """The quickstart's team, each agent with a policy of its own; one model serves them all."""
    agents = {name: replace(agent, policy=name) for name, agent in run.team.agents.items()}
    return Play(team=replace(run.team, agents=agents), sampling=Sampling(temperature=1.0), judge=run.judge, seed=0)


def tiny(run: Run, culprit: str) -> Case:
    """The first failed traces of a team with one corrupted agent."""
    engine = CorruptingEngine(run.engine, culprit, run.tokenizer, modulus=run.config.data.modulus)
    how = tiny_play(run)
    failed = [trace for trace in collected(engine, run.test_tasks[: 8 * NUM_TINY], how) if trace.reward == 0.0][:NUM_TINY]
    return Case(
        name=f"tiny, corrupted {culprit}", kind="tiny", how=how, engine=engine, traces=tuple(failed),
        culprits=(culprit,) * len(failed),
    )  # fmt: skip
