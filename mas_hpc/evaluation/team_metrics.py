"""What a team does with its turns, from its traces: agreement, flips, readability, verdicts, tokens, credit.

Nothing that is missing is dropped or counted as right: ungraded traces, failed turns and unknown truths have their own counts.
Rates are of committed turns where order matters (rounds, flips), and of every turn but counterfactual ones elsewhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from mas_hpc.agents.role import Produces
from mas_hpc.errors import DataError
from mas_hpc.evaluation.metrics import (
    VerdictBalance,
    balanced_verdicts,
    clustered_mean,
    tokens_per_correct,
    tokens_per_question,
    wilson,
)
from mas_hpc.types import Trace, Turn, rounds_of

Roles = Mapping[str, Produces]
"""What each agent of the team produces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """How the traces ended, with the 95% Wilson interval of the accuracy.

    Example: 6 right, 3 wrong and 1 ungraded trace have n=10, right=6, ungraded=1, accuracy=0.6
    """

    n: int
    right: int
    ungraded: int
    """Traces without a reward, such as unfinished ones; not right."""
    accuracy: float
    """right / n."""
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUse:
    """Tokens sampled to answer, all tries included.

    Example: two traces of 30 and 50 tokens, the second right: TokenUse(total=80, per_question=40.0, per_correct=80.0)
    """

    total: int
    per_question: float
    per_correct: float | None
    """None when no trace is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """What became of answers: pairs of an earlier answer and a later one.

    Example: right then wrong, and wrong then wrong: Flips(to_right=0, to_wrong=1, stayed_right=0, stayed_wrong=1, unknown=0)
    """

    to_right: int
    to_wrong: int
    stayed_right: int
    stayed_wrong: int
    unknown: int
    """Pairs of which one has no truth: a failed or an ungraded turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The answers that were given in one state, over all traces: a round of a debate, a layer of a mixture, a step of a chain.

    Example: answers 4, 4, 5 in the only trace, where 4 is right: num_traces=1, num_answers=3, agreement=1/3, accuracy=2/3
    """

    number: int
    """Position of the round in its trace, from 0; rounds in which nobody gives an answer are left out."""
    num_traces: int
    num_answers: int
    """Turns whose role gives an answer."""
    agreement: float | None
    """Share of a trace's pairs of turns that give the same text, and not None, pooled over traces; None without pairs."""
    accuracy: float
    """Share of right answers; a turn without truth is not right."""
    unreadable: float
    """Share of turns without a readable answer, failed ones included."""
    ungraded: int
    """Turns without truth: failed or ungraded."""
    flips: Flips
    """Against the latest answer of the same agent in an earlier round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseRate:
    """How often an agent's answer or verdict could be read.

    Example: of 10 turns 7 readable, 2 unreadable, 1 failed: ParseRate(asked=10, readable=7, failed=1, rate=0.7)
    """

    asked: int
    readable: int
    failed: int
    """Turns that ended in an error; not readable."""
    rate: float | None
    """readable / asked; None when the agent never spoke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveVerdicts:
    """How a judge does on the answers that its own team gave it.

    Example: approving a right, a wrong and an ungraded answer: balance.n=2, balance.balanced_accuracy=0.5, ungraded=1
    """

    balance: VerdictBalance
    """Of the verdicts whose truth is known; a failed turn is an unreadable verdict."""
    ungraded: int
    """Verdicts without truth, in no recall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishReasons:
    """How an agent's turns ended.

    Example: FinishReasons(stop=8, length=1, error=1)
    """

    stop: int
    length: int
    error: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleCredit:
    """Mean credit of an agent's turns; its standard error is clustered by question.

    Example: credits 1 and 0 on two questions and a turn without: RoleCredit(mean=0.5, standard_error=0.5, n=2, missing=1)
    """

    mean: float | None
    """None without credited turns."""
    standard_error: float | None
    """None with fewer than two questions."""
    n: int
    missing: int
    """Turns without credit."""


def outcomes(traces: Sequence[Trace]) -> Outcomes:
    """Right, wrong and ungraded traces."""
    right = sum(trace.reward == 1.0 for trace in traces)
    low, high = wilson(right, len(traces))
    return Outcomes(
        n=len(traces), right=right, ungraded=sum(trace.reward is None for trace in traces), accuracy=right / len(traces),
        low=low, high=high,
    )  # fmt: skip


def token_use(traces: Sequence[Trace]) -> TokenUse:
    """Tokens in all, a question and a right answer."""
    return TokenUse(
        total=sum(len(turn.completion_ids) for turn in _tries(traces)),
        per_question=tokens_per_question(traces),
        per_correct=tokens_per_correct(traces),
    )


def convergence(traces: Sequence[Trace], roles: Roles) -> tuple[Round, ...]:
    """Per round of the committed paths: agreement, accuracy, and how each agent's own answer changed."""
    spoken: dict[int, list[Sequence[Turn]]] = defaultdict(list)
    pairs: dict[int, list[tuple[bool | None, bool | None]]] = defaultdict(list)
    for trace in traces:
        latest: dict[str, Turn] = {}
        for number, turns in _answer_rounds(trace, roles):
            spoken[number].append(turns)
            pairs[number] += [(latest[turn.agent].truth, turn.truth) for turn in turns if turn.agent in latest]
            latest |= {turn.agent: turn for turn in turns}
    return tuple(_round(number, spoken[number], count_flips(pairs[number])) for number in sorted(spoken))


def _round(number: int, spoken: Sequence[Sequence[Turn]], flips: Flips) -> Round:
    turns = [turn for together in spoken for turn in together]
    agrees = [
        one.answer is not None and one.answer == other.answer for together in spoken for one, other in combinations(together, 2)
    ]
    return Round(
        number=number, num_traces=len(spoken), num_answers=len(turns), agreement=fmean(agrees) if agrees else None,
        accuracy=fmean(turn.truth is True for turn in turns), unreadable=fmean(turn.answer is None for turn in turns),
        ungraded=sum(turn.truth is None for turn in turns), flips=flips,
    )  # fmt: skip


def flips(traces: Sequence[Trace], roles: Roles) -> dict[str, Flips]:
    """What became of the answers, by "earlier agent -> later agent", along the committed paths.

    Each answer is compared with those of the latest round before it that gave any: with its own agent's where that spoke in it
    (a debater, a looped reviser), else with every one (solver -> reviser, proposer -> aggregator).
    """
    pairs: dict[str, list[tuple[bool | None, bool | None]]] = defaultdict(list)
    for trace in traces:
        before: Sequence[Turn] = ()
        for _, turns in _answer_rounds(trace, roles):
            for turn in turns:
                for earlier in [other for other in before if other.agent == turn.agent] or before:
                    pairs[f"{earlier.agent} -> {turn.agent}"].append((earlier.truth, turn.truth))
            before = turns
    return {name: count_flips(found) for name, found in pairs.items()}


def count_flips(pairs: Iterable[tuple[bool | None, bool | None]]) -> Flips:
    """Count (truth of the earlier answer, truth of the later one)."""
    counts = Counter(pairs)
    known = {(before, after): counts[before, after] for before in (True, False) for after in (True, False)}
    return Flips(
        to_right=known[False, True], to_wrong=known[True, False], stayed_right=known[True, True],
        stayed_wrong=known[False, False], unknown=counts.total() - sum(known.values()),
    )  # fmt: skip


def parse_rate(traces: Sequence[Trace], roles: Roles) -> dict[str, ParseRate]:
    """Per agent whose role gives an answer or a verdict: how often it could be read."""
    found: dict[str, list[Turn]] = {agent: [] for agent, produces in roles.items() if produces != "text"}
    for turn in _tries(traces):
        if _produces(turn, roles) != "text":
            found[turn.agent].append(turn)
    return {agent: _parsed(turns, roles[agent]) for agent, turns in found.items()}


def _parsed(turns: Sequence[Turn], produces: Produces) -> ParseRate:
    readable = sum((turn.answer if produces == "answer" else turn.verdict) is not None for turn in turns)
    return ParseRate(
        asked=len(turns), readable=readable, failed=sum(turn.finish == "error" for turn in turns),
        rate=readable / len(turns) if turns else None,
    )  # fmt: skip


def live_verdicts(traces: Sequence[Trace], roles: Roles) -> dict[str, LiveVerdicts]:
    """Per agent whose role gives a verdict: its balance on the team's own answers, which may leave it few wrong ones."""
    pairs: dict[str, list[tuple[bool | None, bool]]] = {agent: [] for agent, made in roles.items() if made == "verdict"}
    ungraded: Counter[str] = Counter()
    for turn in _tries(traces):
        if _produces(turn, roles) != "verdict":
            continue
        if turn.truth is None:
            ungraded[turn.agent] += 1
        else:
            pairs[turn.agent].append((turn.verdict, turn.truth))
    return {agent: LiveVerdicts(balance=balanced_verdicts(found), ungraded=ungraded[agent]) for agent, found in pairs.items()}


def finish_reasons(traces: Sequence[Trace]) -> dict[str, FinishReasons]:
    """Per agent that spoke: turns that ended by themselves, at the length limit and in an error."""
    counts = Counter((turn.agent, turn.finish) for turn in _tries(traces))
    agents = dict.fromkeys(agent for agent, _ in counts)
    return {
        agent: FinishReasons(stop=counts[agent, "stop"], length=counts[agent, "length"], error=counts[agent, "error"])
        for agent in agents
    }


def credit_by_role(traces: Sequence[Trace]) -> dict[str, RoleCredit]:
    """Per agent that spoke: mean credit of its turns. Centred within each agent's group, the mean is 0 by construction."""
    credits: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    missing: Counter[str] = Counter()
    for turn in _tries(traces):
        if turn.credit is None:
            missing[turn.agent] += 1
        else:
            credits[turn.agent][turn.task_id].append(turn.credit)
    agents = dict.fromkeys(turn.agent for turn in _tries(traces))
    return {agent: _credit(list(credits[agent].values()), missing[agent]) for agent in agents}


def _credit(by_question: Sequence[Sequence[float]], missing: int) -> RoleCredit:
    if not by_question:
        return RoleCredit(mean=None, standard_error=None, n=0, missing=missing)
    mean = clustered_mean(by_question)
    return RoleCredit(mean=mean.mean, standard_error=mean.standard_error, n=mean.n, missing=missing)


def summary(traces: Sequence[Trace], roles: Roles) -> dict[str, Any]:
    """All of the above as plain data for results.json, under the names of the functions.

    Raises DataError without traces, or when an agent of a trace is not in `roles`.
    """
    if not traces:
        raise DataError("no traces to summarise: expected at least one; collect some with `mas-hpc rollout` or `evaluate`")
    return {
        "outcomes": asdict(outcomes(traces)),
        "token_use": asdict(token_use(traces)),
        "convergence": [asdict(found) for found in convergence(traces, roles)],
        "flips": _plain(flips(traces, roles)),
        "parse_rate": _plain(parse_rate(traces, roles)),
        "live_verdicts": _plain(live_verdicts(traces, roles)),
        "finish_reasons": _plain(finish_reasons(traces)),
        "credit_by_role": _plain(credit_by_role(traces)),
    }


def _plain(records: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: asdict(record) for name, record in records.items()}


def _tries(traces: Iterable[Trace]) -> list[Turn]:
    """Every turn, committed or not, but those that only value another."""
    return [turn for trace in traces for turn in trace.turns if not turn.counterfactual]


def _answer_rounds(trace: Trace, roles: Roles) -> list[tuple[int, tuple[Turn, ...]]]:
    """(number of the round, its turns whose role gives an answer), without the rounds that have none."""
    rounds = enumerate(rounds_of(trace.path))
    answers = [(number, tuple(turn for turn in turns if _produces(turn, roles) == "answer")) for number, turns in rounds]
    return [(number, turns) for number, turns in answers if turns]


def _produces(turn: Turn, roles: Roles) -> Produces:
    if turn.agent not in roles:
        raise DataError(
            f"turn {turn.id}: agent {turn.agent!r} is not in the team, expected one of {sorted(roles)}; "
            "give the team that the traces were collected with"
        )
    return roles[turn.agent]


def print_team(console: Console, summary: Mapping[str, Any]) -> None:
    """A sentence on the outcome, then tables of the agents, the rounds and the flips."""
    found, tokens = summary["outcomes"], summary["token_use"]
    per_correct = "no right answer" if tokens["per_correct"] is None else f"{tokens['per_correct']:.1f} a right answer"
    console.print(
        f"{found['right']} of {found['n']} right ({found['accuracy']:.1%}, 95% {found['low']:.1%} - {found['high']:.1%}), "
        f"{found['ungraded']} ungraded; tokens: {tokens['per_question']:.1f} a question, {per_correct}",
        highlight=False,
    )
    tables = (_agent_table(summary), _round_table(summary["convergence"]), _flip_table(summary["flips"]))
    for table in tables:
        if table.row_count:
            console.print(table)


def _agent_table(summary: Mapping[str, Any]) -> Table:
    credited = any(credit["mean"] is not None for credit in summary["credit_by_role"].values())
    columns = ("turns", "failed", "cut", "readable", "balanced", *(("credit", "+-", "uncredited") if credited else ()))
    table = _numbers("agents", "agent", *columns)
    for agent, finish in summary["finish_reasons"].items():
        parsed, judged = summary["parse_rate"].get(agent), summary["live_verdicts"].get(agent)
        credit = summary["credit_by_role"][agent]
        earned = (_number(credit["mean"], "+.3f"), _number(credit["standard_error"], ".3f"), str(credit["missing"]))
        table.add_row(
            agent, str(sum(finish.values())), str(finish["error"]), str(finish["length"]),
            _number(parsed and parsed["rate"]), _number(judged and judged["balance"]["balanced_accuracy"]),
            *(earned if credited else ()),
        )  # fmt: skip
    return table


def _round_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    table = _numbers("answers by round", "#", "answers", "agree", "right", "unreadable", "to right", "to wrong", "ungraded")
    for row in rounds:
        changed = (str(row["flips"]["to_right"]), str(row["flips"]["to_wrong"]))
        shares = (_number(row[name]) for name in ("agreement", "accuracy", "unreadable"))
        table.add_row(str(row["number"]), str(row["num_answers"]), *shares, *changed, str(row["ungraded"]))
    return table


def _flip_table(flips: Mapping[str, Mapping[str, int]]) -> Table:
    names = ("to_right", "to_wrong", "stayed_right", "stayed_wrong", "unknown")
    table = _numbers("from one answer to the next", "agents", *(name.replace("_", " ") for name in names))
    for pair, counts in flips.items():
        table.add_row(pair, *(str(counts[name]) for name in names))
    return table


def _numbers(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, min_width=12, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None, form: str = ".1%") -> str:
    return "-" if value is None else format(value, form)
