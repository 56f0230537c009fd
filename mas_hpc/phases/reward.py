"""Who says how good a turn is: the verifier, or a trained reward model or PRM; and what length and truncation cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Literal, cast

from torch import sigmoid, tensor

from mas_hpc.config import ModelConfig, StepsConfig
from mas_hpc.config_methods import OfflineMethod, OnlineConfig, ProcessRewardConfig, RewardModelConfig
from mas_hpc.credit_assignment.shaping import overlong_penalty
from mas_hpc.data.preferences import scored
from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models.heads import ScalarHead
from mas_hpc.models.load import load_model
from mas_hpc.run import Run
from mas_hpc.training.network import Network
from mas_hpc.types import Sample, Trace, Turn

CARD = "reward_model.json"
TRUNCATION_PENALTY = 1.0


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A trained reward model. A process reward model scores the steps, in (0, 1); the others the whole answer."""

    network: Network
    reads: Literal["answer", "steps"]
    separator: str
    """What ends a step; empty: every token is one."""

    def score(self, run: Run, turns: Sequence[Turn]) -> list[dict[int, float]]:
        """For each turn, scores by offset of the completion token where they are read. Collective."""
        places = [self._places(turn, run) for turn in turns]
        samples = [scored(_sample(turn), at=at) for turn, at in zip(turns, places, strict=True)]
        read = self.network.annotate(samples, run.world, column="score", read="score")
        found = [[sample.columns["score"][place + 1] for place in at] for sample, at in zip(read, places, strict=True)]
        if self.reads == "steps":
            found = [sigmoid(tensor(values)).tolist() for values in found]
        return [dict(zip(at, values, strict=True)) for at, values in zip(places, found, strict=True)]

    def _places(self, turn: Turn, run: Run) -> list[int]:
        last = len(turn.completion_ids) - 1
        if self.reads == "answer":
            return [last]
        if not self.separator:
            return list(range(last + 1))
        text, ends = "", []
        for place, token in enumerate(turn.completion_ids):
            before = text.count(self.separator)
            text += run.tokenizer.decode([token], skip_special_tokens=True)
            is_unended = place == last and text.rpartition(self.separator)[2].strip()
            if text.count(self.separator) > before or is_unended:
                ends.append(place)
        return ends or [last]


def _sample(turn: Turn) -> Sample:
    return Sample(
        id=turn.id, tree=turn.task_id, agent=turn.agent, policy="", prompt_ids=turn.prompt_ids, prompt_spans=turn.prompt_spans,
        completion_ids=turn.completion_ids,
    )  # fmt: skip


def save_card(folder: Path, method: OfflineMethod, separator: str) -> None:
    """Beside the weights of a reward model, what it was trained to read."""
    assert isinstance(method, RewardModelConfig | ProcessRewardConfig)
    card = {"reads": "steps" if isinstance(method, ProcessRewardConfig) else "answer", "separator": separator}
    (folder / CARD).write_text(json.dumps(card), encoding="utf-8")


def step_separator(run: Run) -> str:
    """What ends a step in the data of the run; in the tiny model's answers every character is one."""
    return run.config.data.separator if isinstance(run.config.data, StepsConfig) else ""


def read_card(folder: Path) -> dict[str, str]:
    """What the reward model of a folder reads. Raises CheckpointError for a folder that holds none."""
    try:
        return cast(dict[str, str], json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"method.reward_model={str(folder)!r}: no {CARD} there ({error}); expected runs/<name>/model of a run with "
            "method.kind rm or prm"
        ) from None


def load_reward_model(run: Run, path: str) -> RewardModel:
    """Read a trained reward model. Raises ConfigError for another vocabulary, CheckpointError for a folder that is none."""
    folder = Path(path)
    card = read_card(folder)
    model, tokenizer = load_model(ModelConfig(path=path, dtype=run.config.model.dtype), seed=0, device=run.world.device)
    if tokenizer.get_vocab() != run.tokenizer.get_vocab():
        raise ConfigError(f"method.reward_model={path!r}: its vocabulary is not that of model.path={run.config.model.path!r}")
    head = ScalarHead.load(folder, model.config.hidden_size).to(run.world.device)
    network = Network(model=model.requires_grad_(False), head=head, max_tree_tokens=run.config.model.max_tree_tokens)
    return RewardModel(network=network, reads="steps" if card["reads"] == "steps" else "answer", separator=card["separator"])


def rewarded(
    run: Run, traces: Sequence[Trace], method: OnlineConfig, model: RewardModel | None
) -> tuple[list[Trace], StepRewards]:
    """The traces with the model's rewards on answers in place of the verifier's, and the price of length and truncation.

    A PRM's reward of an answer is that of its worst step (arXiv 2305.20050 compares it with the product). A reward that is
    not finite is none: the turn counts as failed, in no baseline (golden G22).
    """
    answers = [turn for trace in traces for turn in trace.turns if _is_answer(run, turn)] if model else []
    steps = {id(turn): found for turn, found in zip(answers, model.score(run, answers), strict=True)} if model else {}
    by_step: StepRewards = {}

    def of(trace: Trace, turn: Turn) -> Turn:
        if turn.reward is None:
            return turn
        local = turn.local_reward or 0.0
        if id(turn) in steps:
            local = min(steps[id(turn)].values(), key=lambda score: (isfinite(score), score))
            by_step[turn.id] = steps[id(turn)]
        local += _price(run, trace, turn, method)
        if not isfinite(local):
            return replace(turn, local_reward=None, reward=None)
        return replace(turn, local_reward=local, reward=local + method.alpha * (turn.team_reward or 0.0))

    changed = [replace(trace, turns=tuple(of(trace, turn) for turn in trace.turns)) for trace in traces]
    return changed, by_step if model and model.reads == "steps" else {}


StepRewards = dict[str, Mapping[int, float]]
"""By turn id: reward by offset of the completion token that ends a step."""


def _is_answer(run: Run, turn: Turn) -> bool:
    return run.team.agents[turn.agent].role.produces == "answer" and turn.reward is not None and bool(turn.completion_ids)


def _price(run: Run, trace: Trace, turn: Turn, method: OnlineConfig) -> float:
    limit = run.team.template.limit(trace.task, run.team.agents[turn.agent])
    price = overlong_penalty(len(turn.completion_ids), max_length=limit, buffer=method.overlong_buffer)
    return price - TRUNCATION_PENALTY * (method.truncated == "penalize" and turn.finish == "length")
