"""mas-hpc credit: who earned the reward of a run's traces and who is to blame, and the training data that follows from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, Literal

from mas_hpc.credit_assignment.credit import Credit, CreditMethod
from mas_hpc.credit_assignment.credit import Path as CreditPath
from mas_hpc.credit_assignment.error_localization import Fault, repairs
from mas_hpc.credit_assignment.message_rewards import MessageRewardSettings, default_epsilon
from mas_hpc.data import trace_store
from mas_hpc.data.value_store import ValueStore
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.tensor_layers import digest_of_whole
from mas_hpc.engines import build_engine, native_engine
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.loading import load_other, sharing
from mas_hpc.orchestration.episode import Play, Steps
from mas_hpc.orchestration.replay import ValueFunction
from mas_hpc.orchestration.sampling import Sampling, derive_seed
from mas_hpc.phases.credit_data import step_row, training_rows
from mas_hpc.phases.credit_results import summary, write
from mas_hpc.phases.localize import Localizer, Located, find_faults
from mas_hpc.phases.replays import Game, play_games
from mas_hpc.phases.reward import load_reward_model
from mas_hpc.rollout.engine import BASE_POLICY
from mas_hpc.rollout.router import RoutedEngine
from mas_hpc.rollouts import how_to_play
from mas_hpc.run import Run, policy_version
from mas_hpc.training.reference import weights_digest
from mas_hpc.types import Trace

OF_AGENTS: tuple[CreditMethod, ...] = ("loo", "shapley", "reward_blame")
OF_FAULTS: tuple[CreditMethod, ...] = ("first_error", "reward_blame")
REPLAYED: tuple[CreditMethod, ...] = (*OF_AGENTS, "first_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditOptions:
    """What the command line says. Raises ConfigError for an option that nothing would read.

    Example: CreditOptions(method="shapley", value="masked", replays=4)
    """

    method: CreditMethod
    value: ValueFunction = "removal"
    replays: int = 4
    """Continuations or replays that a value is the mean of."""
    traces: str = ""
    """Stem of a file under traces/; empty: rollout, else the last evaluation that was sampled."""
    limit: int = 0
    """Most traces; 0: all."""
    localizer: Localizer = "value"
    epsilon: float = 0.0
    """Least drop of a value that is an error; 0: message_rewards.default_epsilon of the replays."""
    resamples: int = 0
    """Alternatives that are sampled in place of a message, for preference pairs; 0: none."""
    pairs: Literal["faults", "all"] = "faults"
    """Which messages get alternatives: the first error of each failed trace, or every message (MALT's search tree)."""
    base: str = ""
    """Model that replaces absent agents under value=replacement."""
    reward_model: str = ""
    """Trained PRM, for process_reward and for localizer=prm."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, without_effect, remedy in _effects(self):
            if without_effect:
                raise ConfigError(f"{option}: without effect here; {remedy}, or leave it out")

    @property
    def name(self) -> str:
        """Of the folder and the traces that are written."""
        value = f"-{self.value}" if self.method in OF_AGENTS else ""
        return f"{self.method}{value}" + (f"-{self.localizer}" if self.localizer != "value" else "")

    @property
    def reads_scores(self) -> bool:
        """Whether a process reward model is asked."""
        return self.method == "process_reward" or self.localizer == "prm"

    @property
    def settings(self) -> MessageRewardSettings:
        """How values become rewards of messages."""
        return MessageRewardSettings(epsilon=self.epsilon or default_epsilon(self.replays))


def _effects(options: CreditOptions) -> list[tuple[str, bool, str]]:
    """Options with their values, whether they are given and nothing reads them, and what would."""
    agents, faults = options.method in OF_AGENTS, options.method in OF_FAULTS
    of_agents, of_faults = (f"use --method {' or '.join(methods)}" for methods in (OF_AGENTS, OF_FAULTS))
    scored = f"use --method process_reward, or --method {' or '.join(OF_FAULTS)} with --localizer prm"
    return [
        (f"--value {options.value}", options.value != "removal" and not agents, of_agents),
        (f"--base {options.base}", bool(options.base) and not agents, f"{of_agents}, with --value replacement"),
        (f"--base {options.base}", bool(options.base) and options.value != "replacement", "add --value replacement"),
        (f"--localizer {options.localizer}", options.localizer != "value" and not faults, of_faults),
        (f"--epsilon {options.epsilon:g}", bool(options.epsilon) and not faults, of_faults),
        (f"--reward-model {options.reward_model}", bool(options.reward_model) and not options.reads_scores, scored),
        (
            f"--resamples {options.resamples} --pairs faults",
            bool(options.resamples) and options.pairs == "faults" and not faults, f"{of_faults}, or --pairs all",
        ),
        ("--pairs all", options.pairs == "all" and not options.resamples, "add --resamples"),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The traces of a file: those that can get credit, and how many cannot, by reason."""

    file: Path
    traces: tuple[Trace, ...]
    left_out: Mapping[str, int]


def credit(run: Run, options: CreditOptions) -> dict[str, Any]:
    """Give every message of the run's traces its credit; write it, and return the summary. Collective."""
    selection = select(run, options)
    run = _with_base(run, options)
    sampling = _sampling(run, selection.file)
    how = how_to_play(run, sampling, derive_seed(options.seed, "credit"))
    numbers = range(run.players.rank, len(selection.traces), run.players.size)
    mine = [selection.traces[number] for number in numbers]
    of_all = _scores(run, selection.traces, options)
    scores = [of_all[number] for number in numbers] if of_all else []
    store = ValueStore(run.folder / "credit", rank=run.world.rank)
    gather_lines(run.world, ["ready"])  # all have read the store before anybody adds to it
    weights = _weights(run)

    def replay() -> list[str]:
        looks = options.method in OF_FAULTS
        located = find_faults(run, mine, options.localizer, scores) if looks else Located(faults=[None] * len(mine))
        games = [
            replace(_game(run, trace, how, options, score, fault), outcomes=lambda subject: store.of(f"{subject} | {weights}"))
            for trace, score, fault in zip(mine, scores or [()] * len(mine), located.faults, strict=True)
        ]
        requests = Counter(unparseable=located.unparseable)
        found = _play(run, games, options, store, requests)
        lines = [json.dumps({"number": number, **entry}) for number, entry in zip(numbers, found, strict=True) if entry]
        return [*lines, json.dumps({"requests": requests})]

    lines = run.led(replay, encode=lambda lines: "", decode=lambda told: [])  # of those who lead, all ranks gather them
    gathered = [json.loads(line) for line in gather_lines(run.world, lines)]
    records = {entry["number"]: entry for entry in gathered if "number" in entry}
    totals = sum((Counter(entry["requests"]) for entry in gathered if "requests" in entry), Counter())
    totals["known"] = len(set(gather_lines(run.world, store.used)))
    results = summary(options, selection, records, totals)
    if run.world.is_first:
        write(run, options, selection, records, results)
    return results


def _weights(run: Run) -> str:
    return digest_of_whole(run.world, run.model, lambda: weights_digest(run.model, *run.other_models.values()))


# ---- which traces


def select(run: Run, options: CreditOptions) -> Selection:
    """The traces of the file that can get credit. Raises DataError for an absent file, or one of other weights' traces."""
    file = _trace_file(run.folder, options.traces)
    parts = trace_store.parts(file.parent, file.stem)
    traces = [trace for part in parts for trace in trace_store.read(part)][: options.limit or None]
    left_out: Counter[str] = Counter()
    chosen = []
    for trace in traces:
        if trace.reward is None or not trace.path:
            left_out["unfinished"] += 1
        elif any(turn.finish == "error" for turn in trace.path):
            left_out["with a failed turn"] += 1
        else:
            chosen.append(trace)
    unknown = sorted({turn.agent for trace in chosen for turn in trace.path} - set(run.team.agents))
    if unknown:
        raise DataError(f"{file}: turns of agents {unknown}, who are not in this run's team {list(run.team.agents)}")
    versions = sorted({turn.policy_version for trace in chosen for turn in trace.path if turn.policy not in run.other_models})
    expected = policy_version(run.folder)
    if (options.method in REPLAYED or options.resamples) and versions not in ([], [expected]):
        raise DataError(
            f"{file}: turns of policy versions {versions[0]} to {versions[-1]}, but the run's weights are of version "
            f"{expected}, and replays by other weights would credit other agents; expected --traces to name a file of that "
            "version, such as an evaluation after training, or roll out again from the saved model"
        )
    if not chosen:
        counts = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise DataError(f"{file}: no trace that can get credit: {counts or 'the file is empty'}; roll out again")
    return Selection(file=file, traces=tuple(chosen), left_out=left_out)


def _trace_file(folder: Path, name: str) -> Path:
    """The file that is asked for, or the one that most likely is; several ranks have written its parts."""
    names = {file.stem.partition(".rank")[0] for file in (folder / "traces").glob("*.jsonl")}
    stems = sorted(stem for stem in names if not stem.startswith("credit-"))
    if name:
        if name not in stems:
            raise DataError(f"--traces {name}: no {folder / 'traces' / name}.jsonl; expected one of {stems}")
        return folder / "traces" / f"{name}.jsonl"
    wanted = ("rollout", "after-T1", "evaluate-T1")
    chosen = next((stem for stem in wanted if stem in stems), None)
    chosen = chosen or next((stem for stem in reversed(stems) if re.match("(after|evaluate|rollout)", stem)), None)
    if chosen is None:
        raise DataError(f"{folder}: no traces of a rollout or evaluation; expected --traces to name one of {stems}")
    return folder / "traces" / f"{chosen}.jsonl"


def _sampling(run: Run, file: Path) -> Sampling:
    """As the traces were sampled: evaluations carry their temperature in the file's name."""
    settings = run.config.rollout
    named = re.search(r"-T([0-9.]+)$", file.stem)
    temperature = float(named[1]) if named else settings.temperature
    return Sampling(temperature=temperature, top_p=settings.top_p, top_k=settings.top_k)


def _with_base(run: Run, options: CreditOptions) -> Run:
    """With an engine for the policy that replaces absent agents. Raises ConfigError where nothing says what that is."""
    if options.value != "replacement":
        return run
    if options.base:
        share = sharing(run.config, run.strategy)
        model = load_other(run.config, options.base, run.tokenizer, "--base", run.world.device, share)
        others = {**run.other_models, BASE_POLICY: model}
        if share:
            own = build_engine(run.config, run.model, run.tokenizer, others, run.shards, run.bank)
            own.load(version=policy_version(run.folder))
            return replace(run, engine=own, other_models=others)
        engine = native_engine(run.config, model, run.tokenizer)
        return replace(run, engine=RoutedEngine(run.engine, {BASE_POLICY: engine}), other_models=others)
    if run.bank is None:
        raise ConfigError(
            "--value replacement: the team is one full model without adapters, so nothing says which policy replaces an "
            "absent agent; give --base MODEL, such as the model before training"
        )
    return run


def _scores(run: Run, traces: Sequence[Trace], options: CreditOptions) -> list[tuple[dict[int, float], ...]]:
    """For every trace and message the scores of its steps by a process reward model; empty without one."""
    if not options.reads_scores:
        return []
    if not options.reward_model:
        raise ConfigError("--reward-model: required; expected runs/<name>/model of a run with method.kind=prm")
    model = load_reward_model(run, options.reward_model)
    if model.reads != "steps":
        raise ConfigError(f"--reward-model {options.reward_model}: it scores whole answers; expected one of method.kind=prm")
    found = iter(model.score(run, [turn for trace in traces for turn in trace.path]))
    return [tuple(next(found) for _ in trace.path) for trace in traces]


# ---- games


def _game(
    run: Run, trace: Trace, how: Play, options: CreditOptions, scores: Sequence[Mapping[int, float]], fault: Fault | None
) -> Game:  # fmt: skip
    path = CreditPath(
        turns=trace.path, players=tuple(run.team.agents), outcome=float(trace.reward or 0.0),
        localized=options.localizer != "value", fault=fault,
        scores=tuple(min(steps.values(), key=lambda score: (isfinite(score), score), default=nan) for steps in scores),
        settings=options.settings, seed=options.seed,
    )  # fmt: skip
    return Game(task=trace.task, path=path, how=how, value=options.value, num_replays=options.replays)


def _play(
    run: Run, games: Sequence[Game], options: CreditOptions, store: ValueStore, requests: Counter[str]
) -> list[dict[str, Any] | None]:  # fmt: skip
    """One record a game; what was sampled until an interruption is kept."""
    bar, advance = run.progress(f"credit: {options.method}", len(games))

    def whole(game: Game) -> Steps[dict[str, Any] | None]:
        credit = yield from game.credit(options.method)
        rows = (yield from training_rows(game, credit, options.resamples, options.pairs)) if credit else {}
        advance()
        return record(game, credit, rows) if credit else None

    try:
        with bar:
            live = max(1, run.config.rollout.max_rows // options.replays)
            numbered = [(game.task.id, whole(game)) for game in games]
            return play_games(run.engine, numbered, max_live=live, requests=requests, on_answers=store.flush)
    finally:
        store.flush()


def record(game: Game, credit: Credit, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of one trace's credit."""
    attribution = credit.attribution
    return {
        "task": game.task.id,
        "outcome": game.path.outcome,
        "agents": list(game.path.agents),
        "rewards": [None if isnan(reward) else reward for reward in credit.rewards],
        "phi": dict(zip(attribution.players, attribution.phi, strict=True)) if attribution else {},
        "standard_error": [None if isnan(error) else error for error in attribution.standard_error] if attribution else [],
        "total": attribution.full - attribution.empty if attribution else None,
        "unplaced": credit.unplaced,
        "residual": credit.residual,
        "values": list(credit.values),
        "failure": asdict(credit.failure) if credit.failure else None,
        "fault": _fault_row(game, credit, credit.fault) if credit.fault else None,
        "steps": step_row(game, credit),
        **rows,
    }


def _fault_row(game: Game, credit: Credit, fault: Fault) -> dict[str, Any]:
    """The first error, and the later turns that tried to repair it: by their values, or by correcting what was wrong."""
    values = dict(enumerate(credit.values))
    spared = repairs(game.path.turns, fault.turn, epsilon=game.path.settings.epsilon, values=values)
    return {**asdict(fault), "repairs": list(spared)}
