"""The records that everything passes around: frozen, standard library only.

A question opens a tree; each turn (one model call by one agent) is a node of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal

Finish = Literal["stop", "length", "error"]
Span = tuple[str, int]  # (policy that wrote the tokens, "" for prompts and cues; number of tokens)
BASE_POLICY = "base"
"""The model without adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation.

    Example: Message(role="user", content="What is 6 x 7?")
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question with its verifiable answer.

    Example: Task(id="gsm8k/test/0", question="What is 6 x 7?", answer="42", grader="math")
    """

    id: str
    question: str
    answer: str
    grader: str = "math"
    """Name in evaluation.graders.GRADERS: how a given answer is compared."""
    compact: str = ""
    """The question in the alphabet of the tiny model; "" when there is none."""
    compact_answer: str = ""
    """The reference answer in that alphabet, of a length that gives nothing away; "" when `answer` is already so."""
    solution: str = ""
    """A worked solution for demonstrations; "" when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One model call by one agent: a node of the tree.

    Example: Turn(id="q0/1.2", parent="q0/0.1", task_id="q0", agent="critic", policy="shared", index=1, sibling=2, ...)
    """

    id: str
    parent: str | None
    """The turn that this one continues: committed, but for counterfactuals; None at the root."""
    task_id: str
    agent: str
    policy: str
    index: int
    """Position in the episode, from 0: turns with equal index and task are siblings or counterfactuals."""
    sibling: int = 0
    """Number among the K candidates sampled from one state."""
    prompt_ids: tuple[int, ...]
    prompt_spans: tuple[Span, ...]
    """Who wrote the prompt, run-length coded; lengths sum to len(prompt_ids)."""
    completion_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    """Natural-log probability of each completion token under the distribution that was sampled from."""
    text: str
    answer: str | None = None
    """What the role's parser read as the proposed answer; None when the role gives none or it is unreadable."""
    verdict: bool | None = None
    """What the role's parser read as the judgement; None when the role gives none or it is unreadable."""
    truth: bool | None = None
    """Whether the answer that it gives, or the answer that it judges, is right."""
    finish: Finish
    error: str = ""
    policy_version: int = 0
    seed: int = 0
    wall_s: float = 0.0
    """Latency of its request: wall time from submission to the end, waiting for room included."""
    committed: bool = False
    counterfactual: bool = False
    """Sampled only to value an earlier turn: outside every group and never trained on."""
    reward: float | None = None
    """alpha * team_reward + local_reward."""
    local_reward: float | None = None
    team_reward: float | None = None
    credit: float | None = None
    """The advantage that training used."""


def rounds_of(path: Sequence[Turn]) -> tuple[tuple[Turn, ...], ...]:
    """Committed turns by round: those that continue the same turn read the same state (a debate's round, a mixture's layer)."""
    return tuple(tuple(group) for _, group in groupby(path, key=lambda turn: turn.parent))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The tree of one question: every turn, committed or not, in the order in which they were sampled.

    Example: Trace(task=task, turns=(solver, critic), answer="42", reward=1.0).path == (solver, critic)
    """

    task: Task
    turns: tuple[Turn, ...]
    answer: str | None = None
    """The team's answer at the end of the committed path."""
    reward: float | None = None
    """Outcome of the committed path: 1.0 right, 0.0 wrong, None not graded."""
    step: int = 0
    """Training step at which it was collected."""
    label: str = ""
    """What it was collected for: train, or the name of an evaluation row."""

    @cached_property
    def path(self) -> tuple[Turn, ...]:
        """The committed turns, root first."""
        return tuple(turn for turn in self.turns if turn.committed)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens sampled along the committed path."""
        return sum(len(turn.completion_ids) for turn in self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the trainer sees of a turn: a path of tokens, of which the completion is trained on.

    Example: Sample(id="q0/0.1", tree="q0", agent="solver", policy="shared", prompt_ids=(5, 6),
        prompt_spans=(("", 2),), completion_ids=(7, 2), advantage=1.2)
    """

    id: str
    tree: str
    """Samples of one tree share prefixes and are packed together."""
    agent: str
    policy: str
    prompt_ids: tuple[int, ...]
    prompt_spans: tuple[Span, ...]
    completion_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...] = ()
    """Empty for demonstrations, which were not sampled by a policy of ours."""
    advantage: float = 1.0
    """Per sequence, shared by its tokens; 1 for demonstrations."""
    loss_mask: tuple[bool, ...] = ()
    """Which completion tokens are trained on; empty means all."""
    label: float = math.nan
    """Of the sequence: 1 chosen, desirable or right; 0 rejected, undesirable or wrong. A pair is its chosen sample directly
    followed by its rejected one, of one tree."""
    margin: float = 0.0
    """How much better the chosen sample of a pair is; on the chosen one."""
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """More values a completion token, by name: reference_logprob, old_logprob, old_value, return, label (of a step), and
    advantage, which then replaces the one of the sequence."""
