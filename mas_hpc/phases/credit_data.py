"""Training data from credit: preference pairs at one prefix, positives for SFT, and step labels for a process reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from typing import Any, Literal

from mas_hpc.credit_assignment.credit import Credit
from mas_hpc.credit_assignment.message_rewards import repair_pairs, step_labels
from mas_hpc.orchestration.episode import Steps
from mas_hpc.phases.replays import Game
from mas_hpc.types import Message, Turn

MIN_MARGIN = 0.25
"""Least difference of two values that makes a preference."""
Rows = dict[str, list[dict[str, Any]]]


def training_rows(game: Game, credit: Credit, count: int, which: Literal["faults", "all"]) -> Steps[Rows]:
    """Sample `count` alternatives of messages and value them; rows `pairs` and `positives` in TRL's formats.

    faults: in place of the first error of a failed path, every alternative that repairs it is preferred to it. all: at every
    message of the path the best of its siblings is preferred to the worst, and is a positive where it mostly succeeds (the
    search tree of MALT, arXiv 2412.01928, with values of means instead of a vote). `unvalued` are siblings whose every
    continuation failed: they make no pair, and are counted. Neither do equal texts of different tokens, such as one that was
    cut off where the other ended.
    """
    rows: Rows = {"pairs": [], "positives": [], "unvalued": []}
    if not count:
        return rows
    fault = credit.failure.first_error if credit.failure else None
    for place in range(len(game.path.turns)) if which == "all" else [] if fault is None else [fault]:
        siblings = yield from game.siblings(place, count)
        rows["unvalued"] += [{"turn": turn.id} for turn, value in siblings if isnan(value)]
        valued = [(turn, value) for turn, value in siblings if not isnan(value) and turn.text.strip()]
        if which == "faults":
            rows["pairs"] += _repairs(game, place, valued)
        elif valued:
            best, worst = max(valued, key=_value), min(valued, key=_value)
            if best[1] - worst[1] >= MIN_MARGIN and best[0].text != worst[0].text:
                rows["pairs"].append(_pair(game, place, best[0], worst[0], best[1] - worst[1]))
            if best[1] > game.path.settings.threshold:
                rows["positives"].append(_prompt(game, place) | {"completion": _answer(game, place, best[0])})
    return rows


def _repairs(game: Game, place: int, valued: Sequence[tuple[Turn, float]]) -> list[dict[str, Any]]:
    """The pairs of the first error; none where it has no value."""
    turns, error = {turn.id: turn for turn, _ in valued}, game.path.turns[place]
    if error.id not in turns:
        return []
    siblings = [(turn.id, value) for turn, value in valued]
    found = repair_pairs(siblings, error.id, prefix_turn=error.parent, min_margin=MIN_MARGIN)
    pairs = [(turns[pair.chosen], pair.margin) for pair in found]
    return [_pair(game, place, chosen, error, margin) for chosen, margin in pairs if chosen.text != error.text]


def _value(sibling: tuple[Turn, float]) -> float:
    return sibling[1]


def _pair(game: Game, place: int, chosen: Turn, rejected: Turn, margin: float) -> dict[str, Any]:
    answers = {"chosen": _answer(game, place, chosen), "rejected": _answer(game, place, rejected)}
    return _prompt(game, place) | answers | {"margin": margin}


def _prompt(game: Game, place: int) -> dict[str, Any]:
    turn = game.path.turns[place]
    prompt = game.how.team.conversation(game.task, game.how.team.agents[turn.agent], game.counterfactual.state(place))
    return {"agent": turn.agent, "task": game.task.id, "prompt": _text(prompt)}


def _answer(game: Game, place: int, turn: Turn) -> str | list[dict[str, str]]:
    prompt = _prompt(game, place)["prompt"]
    return turn.text if isinstance(prompt, str) else _text((Message(role="assistant", content=turn.text),))


def _text(text: str | Sequence[Message]) -> Any:
    return text if isinstance(text, str) else [asdict(message) for message in text]


def step_row(game: Game, credit: Credit) -> dict[str, Any] | None:
    """The path as a solution whose steps are its messages, in TRL's stepwise format; None where values are unknown.

    `labels` are soft: the value after each message. `hard_labels` are 1 before the first error, 0 at it and null (not known)
    after it, as in message_rewards.step_labels; all null after a failure in which no message was found at fault.
    """
    texts = [turn.text for turn in game.path.turns]
    if not credit.values or not all(text.strip() for text in texts):
        return None
    opening = game.how.team.conversation(game.task, game.how.team.agents[game.path.turns[0].agent], ())
    prompt = opening if isinstance(opening, str) else game.task.question
    first_error = credit.failure.first_error if credit.failure else None
    found = step_labels(credit.values, epsilon=game.path.settings.epsilon, first_error=first_error)
    known = credit.failure is None or first_error is not None
    hard = [label if known and not isnan(label) else None for label in found.hard]
    return {"prompt": prompt, "completions": texts, "labels": list(found.soft), "hard_labels": hard}
