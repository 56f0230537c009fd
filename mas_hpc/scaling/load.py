"""What one step of a configuration has to do: completions to sample, tokens to train on, as a tree and as rows.

Lengths are means: the question with its instructions, and a completion. Turns of an episode read all that was said before.
Legend: Q tokens of a question, C of a completion, S turns of an episode, K siblings of a state, G episodes of a question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mas_hpc.config import RunConfig
from mas_hpc.config_methods import ATGRPOConfig, DPOConfig, GroupConfig, OnlineConfig, PPOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of questions and completions, in tokens; completions are lognormal, cut off at the limit.

    Example: Lengths(question=200, completion=400, sigma=0.8, limit=2048, source="a lognormal")
    """

    question: float
    completion: float
    """Mean."""
    sigma: float
    """Standard deviation of the logarithm: 0.8 has its 99th percentile at 4.7 times the mean."""
    limit: int
    observed: tuple[int, ...] = ()
    """Real lengths, which are drawn from in place of the lognormal; empty: none are known."""
    source: str
    """Where they are from, to be printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Tokens that go through the model together.

    Example: Pass(tokens=900, predictors=400, pairs=180_000, rows=1_600)
    """

    tokens: float
    """Of the tree: what siblings share counts once."""
    predictors: float
    """Tokens whose next one is trained."""
    pairs: float
    """Of a token and one that it attends to."""
    rows: float
    """Tokens that a row for each sample would have."""

    def times(self, factor: float) -> Pass:
        """So many of them."""
        return replace(
            self, tokens=factor * self.tokens, predictors=factor * self.predictors, pairs=factor * self.pairs,
            rows=factor * self.rows,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A step of all ranks together.

    Example: load_of(config, lengths).units == 16
    """

    units: int
    """Things that are handed out whole: questions or episodes to play, documents or pairs to learn from."""
    trained: Pass
    """All that is trained on, once."""
    epochs: int
    """Times that it is trained on."""
    updates: int
    """Optimizer steps."""
    extra_forwards: float
    """Passes forward without gradients over the same tokens, by a model of the same size: references, old values."""
    extra_models: float
    """Further models of the same size that are trained on the same tokens: a separate critic."""
    turns: int
    """Of an episode, one after the other; 0 where nothing is sampled."""
    siblings: int
    """Completions that are sampled together from each state of a unit."""
    context: float
    """Tokens that a turn reads, at the middle of an episode."""
    notes: tuple[str, ...] = ()
    """What is not counted."""

    @property
    def completions(self) -> int:
        """That are sampled in a step."""
        return self.units * self.turns * self.siblings


def load_of(config: RunConfig, lengths: Lengths, scale: float = 1.0) -> Load:
    """The step of method; `scale` multiplies the batch (weak scaling)."""
    method = config.method
    if isinstance(method, OnlineConfig):
        return _online(config, method, lengths, scale)
    turns = config.team.max_speakers
    pairs = isinstance(method, DPOConfig) and "kto" not in method.losses
    siblings = 2 if pairs else 1
    units = max(1, round(method.batch_size * scale))
    one = chain(lengths.question, lengths.completion, 1, siblings) if pairs else chain(
        lengths.question, lengths.completion, turns if config.data.kind not in ("documents", "steps") else 1, 1
    )  # fmt: skip
    references = isinstance(method, DPOConfig) and not method.reference_free and _needs_reference(method)
    return Load(
        units=units, trained=one.times(units), epochs=1, updates=1, extra_forwards=float(references), extra_models=0.0,
        turns=0, siblings=1, context=0.0,
    )  # fmt: skip


def chain(question: float, completion: float, turns: int, siblings: int) -> Pass:
    """S turns, each of K siblings from one state, of which one is what the next turn reads."""
    depth, tokens, predictors, pairs, rows = question, question, 0.0, question**2 / 2, 0.0
    for _ in range(turns):
        tokens += siblings * completion
        predictors += siblings * completion
        pairs += siblings * (depth * completion + completion**2 / 2)
        rows += siblings * (depth + completion)
        depth += completion
    return Pass(tokens=tokens, predictors=predictors, pairs=pairs, rows=rows)


def _online(config: RunConfig, method: OnlineConfig, lengths: Lengths, scale: float) -> Load:
    turns = config.team.max_speakers
    tasks = max(1, round(method.tasks_per_step * scale))
    group = method.group_size if isinstance(method, GroupConfig) else 1
    is_tree = isinstance(method, ATGRPOConfig)
    one = chain(lengths.question, lengths.completion, turns, group if is_tree else 1)
    if is_tree:
        units, siblings, work = tasks, group, one.times(tasks)
    else:  # episodes of a question share it alone
        units, siblings = tasks * group, 1
        work = one.times(units)
        shared = (group - 1) * tasks
        fewer = chain(lengths.question, 0.0, 0, 1).times(shared)
        work = replace(work, tokens=work.tokens - fewer.tokens, pairs=work.pairs - fewer.pairs)
    ppo = isinstance(method, PPOConfig)
    separate = isinstance(method, PPOConfig) and method.critic == "separate"
    return Load(
        units=units, trained=work, epochs=method.updates_per_batch, updates=method.updates_per_batch * method.minibatches,
        extra_forwards=float(method.kl.coefficient > 0) + float(ppo), extra_models=float(separate), turns=turns,
        siblings=siblings, context=lengths.question + (turns - 1) / 2 * lengths.completion, notes=_notes(method),
    )  # fmt: skip


def _needs_reference(method: DPOConfig) -> bool:
    return bool(set(method.losses) - {"simpo", "orpo", "sft"})


def _notes(method: OnlineConfig) -> tuple[str, ...]:
    left_out = []
    if isinstance(method, GroupConfig) and method.credit.method != "local":
        left_out.append(f"replays of method.credit.method={method.credit.method}")
    if isinstance(method, ATGRPOConfig) and method.team_rollouts:
        left_out.append(f"continuations of method.team_rollouts={method.team_rollouts}")
    if method.reward_model:
        left_out.append("scores of method.reward_model")
    return tuple(f"not counted: {what}" for what in left_out)
