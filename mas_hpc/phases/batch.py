"""The episodes of one online step: their rewards, their metrics under the names that GRPO users know, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mas_hpc.config_methods import ATGRPOConfig, OnlineMethod
from mas_hpc.credit_assignment.at_grpo import group_metrics
from mas_hpc.phases.accounting import Account
from mas_hpc.phases.reward import StepRewards
from mas_hpc.types import Trace, Turn


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Episodes with their rewards.

    Example: Batch(step=0, traces=[trace], outcomes=[1.0], steps={})
    """

    step: int
    traces: list[Trace]
    outcomes: list[float | None]
    """Reward of each episode: of the turn that gave the team's answer; None where it failed."""
    steps: StepRewards
    """Rewards of steps, by turn id, where a process reward model gave some."""
    credit: Mapping[str, float] = field(default_factory=dict)
    """Metrics of credit by replays, where the method asks for it."""
    tokens: float = 0.0
    """Sampled for it, episodes that dynamic sampling put aside included."""
    account: Account | None = None
    """What sampling it cost, on rank 0 over all ranks; of the episodes that were put aside too."""

    def only(self, tasks: set[str]) -> Batch:
        """The episodes of these questions."""
        kept = [number for number, trace in enumerate(self.traces) if trace.task.id in tasks]
        turns = {turn.id for n in kept for turn in self.traces[n].turns}  # a question asked again has turns of the same ids
        return replace(
            self, traces=[self.traces[n] for n in kept], outcomes=[self.outcomes[n] for n in kept],
            steps={name: found for name, found in self.steps.items() if name in turns},
        )  # fmt: skip

    def joined(self, more: Batch, *, num_tasks: int) -> Batch:
        """With episodes of further questions, until there are `num_tasks`."""
        have = {trace.task.id for trace in self.traces}
        new = list(dict.fromkeys(trace.task.id for trace in more.traces if trace.task.id not in have))
        extra = more.only(set(new[: num_tasks - len(have)]))
        account = self.account.then(more.account) if self.account and more.account else self.account
        costs = {name: value + self.credit.get(name, 0.0) for name, value in more.credit.items() if name in SUMS}
        return replace(
            self, traces=self.traces + extra.traces, outcomes=self.outcomes + extra.outcomes,
            steps={**self.steps, **extra.steps}, tokens=self.tokens + more.tokens,
            credit={**self.credit, **costs}, account=account,
        )  # fmt: skip


SUMS = ("credit/asked", "credit/sampled", "credit/tokens", "credit/missing")
"""Metrics of credit that add up over rounds of sampling; the others are the first round's."""


def with_credit(trace: Trace, credit: Callable[[Turn], float | None]) -> Trace:
    """The trace with another credit on every turn."""
    return replace(trace, turns=tuple(replace(turn, credit=credit(turn)) for turn in trace.turns))


def batch_metrics(batch: Batch, method: OnlineMethod) -> dict[str, float]:
    """Of the team: accuracy, reward, reward_std, frac_reward_zero_std, completions/*; of each agent: reward/*, failed/*."""
    turns = [turn for trace in batch.traces for turn in trace.turns if not turn.counterfactual]
    lengths = [len(turn.completion_ids) for turn in turns]
    outcomes = [outcome for outcome in batch.outcomes if outcome is not None]
    metrics = {
        "accuracy": fmean(trace.reward or 0.0 for trace in batch.traces),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(turn.finish == "length" for turn in turns),
    }
    if outcomes:
        metrics |= {"reward": fmean(outcomes), "reward_std": pstdev(outcomes)}
    if isinstance(method, ATGRPOConfig):
        return metrics | group_metrics(batch.traces)
    metrics["frac_reward_zero_std"] = _flat_groups(batch)
    for agent in dict.fromkeys(turn.agent for turn in turns):
        metrics[f"failed/{agent}"] = fmean(turn.reward is None for turn in turns if turn.agent == agent)
        if rewards := [turn.reward for turn in turns if turn.agent == agent and turn.reward is not None]:
            metrics[f"reward/{agent}"] = fmean(rewards)
    return metrics


def sampled_tokens(traces: Sequence[Trace]) -> float:
    """Completion tokens of all turns, those included that only value another."""
    return float(sum(len(turn.completion_ids) for trace in traces for turn in trace.turns))


def _flat_groups(batch: Batch) -> float:
    groups: dict[str, set[float | None]] = {}
    for trace, outcome in zip(batch.traces, batch.outcomes, strict=True):
        groups.setdefault(trace.task.id, set()).add(outcome)
    return fmean(len(outcomes) < 2 for outcomes in groups.values())


def print_completions(console: Console, traces: Sequence[Trace], step: int, *, rows: int = 4) -> None:
    """A few turns of a batch: question, completion, rewards and advantage. Model output is text, never markup."""
    table = Table("question", "agent", "completion", title=f"step {step + 1}: sampled completions", title_justify="left")
    for column in ("reward", "team", "advantage"):
        table.add_column(column, justify="right")
    shown = [(trace, turn) for trace in traces for turn in trace.turns if turn.credit is not None]
    for trace, turn in shown[:: max(1, len(shown) // rows)][:rows]:
        numbers = (turn.local_reward, turn.team_reward, turn.credit)
        cells = ["-" if number is None else f"{number:+.3f}" for number in numbers]
        question = trace.task.compact or trace.task.question
        table.add_row(Text(_short(question)), turn.agent, Text(_short(turn.text)), *cells)
    console.print(table)


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
