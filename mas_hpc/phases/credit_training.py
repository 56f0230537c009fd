"""Credit by replays while training: as the reward of each sibling, or as the weight of its advantage."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import fsum, isnan

from mas_hpc.config_methods import ATGRPOConfig, CreditConfig, GroupConfig
from mas_hpc.credit_assignment.centring import credit_weights, erased_by_centring, guarded
from mas_hpc.credit_assignment.credit import Path
from mas_hpc.credit_assignment.message_rewards import MessageRewardSettings, default_epsilon
from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.orchestration.episode import Play, Steps
from mas_hpc.orchestration.replay import continued
from mas_hpc.orchestration.sampling import Sampling, derive_seed
from mas_hpc.phases.replays import Game, play_games
from mas_hpc.rollouts import how_to_play
from mas_hpc.run import Run
from mas_hpc.types import Trace, Turn

Metrics = dict[str, float]
Target = tuple[int, Turn]
"""(number of the trace, the turn whose path is played to its end)"""


def with_sibling_credit(run: Run, traces: Sequence[Trace], method: GroupConfig, step: int) -> tuple[list[Trace], Metrics]:
    """Every turn earns the credit of its message on its own path: continued from it, where another sibling was committed.

    A turn whose credit is missing, since all replays of a value failed, counts as failed. Metrics: the share of each agent's
    credit that centring within groups will erase, and what the replays cost. Collective.
    """
    targets = [
        (number, turn)
        for number, trace in enumerate(traces)
        for turn in trace.turns
        if turn.reward is not None and not turn.counterfactual
    ]
    found, metrics = _play(run, traces, targets, method.credit, step)
    earned: dict[tuple[int, str], float | None] = {
        (number, turn.id): None if rewards is None else rewards[turn.index]
        for (number, turn), rewards in zip(targets, found, strict=True)
    }

    def of(number: int, turn: Turn) -> Turn:
        if (number, turn.id) not in earned:
            return turn
        credit = earned[number, turn.id]
        reward = None if credit is None else credit + method.alpha * (turn.team_reward or 0.0)
        return replace(turn, local_reward=credit, reward=reward)

    changed = [replace(trace, turns=tuple(of(n, turn) for turn in trace.turns)) for n, trace in enumerate(traces)]
    metrics["credit/missing"] = float(sum(credit is None for credit in earned.values()))
    return changed, metrics | erased(changed, by_state=isinstance(method, ATGRPOConfig))


def with_credit_weights(run: Run, traces: Sequence[Trace], method: GroupConfig, step: int) -> tuple[list[Trace], Metrics]:
    """Advantages (Turn.credit) times the size of their agent's credit on the committed path; see centring.guarded. Collective.

    A trace whose credit is missing keeps its advantages as they are, and is counted.
    """
    targets = [
        (number, trace.path[-1])
        for number, trace in enumerate(traces)
        if trace.path and all(turn.finish != "error" for turn in trace.path)
    ]
    found, metrics = _play(run, traces, targets, method.credit, step)
    phi = {
        number: _by_agent(traces[number].path, rewards)
        for (number, _), rewards in zip(targets, found, strict=True)
        if rewards is not None
    }
    metrics["credit/missing"] = float(len(traces) - len(phi))
    for agent in dict.fromkeys(name for credit in phi.values() for name in credit):
        values = [credit[agent] for credit in phi.values() if agent in credit]
        metrics[f"credit_of/{agent}"] = fsum(values) / len(values)

    def of(number: int, turn: Turn) -> Turn:
        credit = phi.get(number, {})
        if turn.credit is None or turn.agent not in credit:
            return turn
        weight = credit_weights(credit, limit=method.credit.weight_limit)[turn.agent]
        return replace(turn, credit=guarded(turn.credit, credit[turn.agent], weight))

    return [replace(trace, turns=tuple(of(n, turn) for turn in trace.turns)) for n, trace in enumerate(traces)], metrics


def _by_agent(path: Sequence[Turn], rewards: Sequence[float]) -> dict[str, float]:
    parts: dict[str, list[float]] = defaultdict(list)
    for turn, reward in zip(path, rewards, strict=True):
        parts[turn.agent].append(reward)
    return {agent: fsum(values) for agent, values in parts.items()}


def erased(traces: Sequence[Trace], *, by_state: bool) -> Metrics:
    """Per agent, the share of its rewards' variance that group centring erases."""
    rewards: dict[str, list[tuple[float, Hashable]]] = defaultdict(list)
    for number, trace in enumerate(traces):
        for turn in trace.turns:
            if turn.reward is not None and not turn.counterfactual and (by_state or turn.committed):
                key = (number, turn.index) if by_state else trace.task.id
                rewards[turn.agent].append((turn.reward, key))
    return {
        f"erased_by_centring/{agent}": erased_by_centring(*zip(*found, strict=True)).erased_share
        for agent, found in rewards.items()
    }


def _play(
    run: Run, traces: Sequence[Trace], targets: Sequence[Target], settings: CreditConfig, step: int
) -> tuple[list[list[float] | None], Metrics]:  # fmt: skip
    """The rewards of the messages on each target's path, and what they cost. A question's paths stay on one rank, and share."""
    sampling = Sampling(temperature=run.config.rollout.temperature)
    how = how_to_play(run, sampling, derive_seed(run.config.seed, "credit", step))
    questions = list(dict.fromkeys(trace.task.id for trace in traces))
    owner = {question: number % run.players.size for number, question in enumerate(questions)}
    mine = [n for n, (number, _) in enumerate(targets) if owner[traces[number].task.id] == run.players.rank]
    requests: Counter[str] = Counter()

    def replay() -> list[str]:
        played = [(traces[targets[n][0]], targets[n][1]) for n in mine]
        games = [(trace.task.id, _credit(run, trace, turn, how, settings)) for trace, turn in played]
        found = play_games(run.engine, games, max_live=max(1, run.config.rollout.max_rows // 8), requests=requests)
        return [json.dumps([number, rewards]) for number, rewards in zip(mine, found, strict=True)]

    lines = run.led(replay, encode=lambda lines: "", decode=lambda told: [])  # of those who lead, all ranks gather them
    run.serve_others()
    rewards = dict(json.loads(line) for line in gather_lines(run.world, lines))
    costs = [json.loads(line) for line in gather_lines(run.world, [json.dumps(requests)])]
    metrics = {f"credit/{name}": float(sum(cost.get(name, 0) for cost in costs)) for name in ("asked", "sampled", "tokens")}
    return [rewards[number] for number in range(len(targets))], metrics


def _credit(run: Run, trace: Trace, turn: Turn, how: Play, settings: CreditConfig) -> Steps[list[float] | None]:
    path = trace.path
    if not turn.committed:
        kept = (*(earlier for earlier in path if earlier.index < turn.index), turn)
        path = yield from continued(trace.task, how, kept, origin=f"{turn.id}~onward/")
    if any(later.finish == "error" for later in path):
        return None
    outcome = how.judge.outcome(trace.task, how.team.answer(path))
    asked = Path(
        turns=path, players=tuple(run.team.agents), outcome=outcome, seed=how.seed,
        settings=MessageRewardSettings(epsilon=default_epsilon(settings.replays)),
    )  # fmt: skip
    game = Game(task=trace.task, path=asked, how=how, value=settings.value, num_replays=settings.replays)
    credit = yield from game.credit(settings.method)
    return None if credit is None or any(map(isnan, credit.rewards)) else list(credit.rewards)
