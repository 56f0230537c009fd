"""Where the samples of an offline method come from: rows of a file, or a demonstrator's answers to the questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from random import Random
from typing import Any

from mas_hpc.agents.template import CompactTemplate
from mas_hpc.config import DocumentsConfig, ReasoningGymConfig, RecordConfig, RingConfig, StepsConfig
from mas_hpc.config_methods import DPOConfig, OfflineConfig, OfflineMethod, ProcessRewardConfig, RewardModelConfig, SFTConfig
from mas_hpc.data.compact_puzzles import PUZZLES
from mas_hpc.data.documents import document_sample, load_documents
from mas_hpc.data.preferences import Pair, Unpaired, load_preferences, pair_samples, scored, unpaired_sample
from mas_hpc.data.steps import load_steps, step_sample
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.evaluation.graders import grade
from mas_hpc.orchestration.demonstrate import Demonstrator, demonstrate
from mas_hpc.orchestration.demonstrators import PlanningDemonstrator, ReferenceDemonstrator, RingDemonstrator
from mas_hpc.orchestration.sampling import derive_seed
from mas_hpc.run import Run
from mas_hpc.types import Sample, Task

Example = tuple[Sample, ...]
"""What is drawn together: a document, a transcript's turns, the two samples of a pair, a judged solution."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data of one offline phase."""

    batch: Callable[[int], list[Sample]]
    """Samples of a step; the same step always gives the same."""
    held_out: Callable[[], list[Sample]]


def build_source(run: Run, method: OfflineMethod, phase: str) -> Source:
    """Samples for a method from what `data` names. Raises DataError, ConfigError."""
    if isinstance(method, SFTConfig) and not isinstance(run.config.data, RecordConfig):
        return _transcripts(run, method, phase)
    if isinstance(run.config.data, RecordConfig):
        train, test = _records(run, method)
        draw, num_train = (lambda number, epoch: train[number]), len(train)
    else:
        tasks, answers = training_tasks(run), _judged_answers(run, method)
        draw, num_train = (lambda number, epoch: answers(tasks[number], epoch)), len(tasks)
        test = [answers(task, 0) for task in run.test_tasks[: run.config.evaluation.num_tasks]]
    held_out = [sample for example in test[: run.config.evaluation.num_tasks] for sample in example]
    batch = _epochs(draw, num_train, method.batch_size, derive_seed(run.config.seed, phase))
    return Source(batch=batch, held_out=lambda: held_out)


def _epochs(
    draw: Callable[[int, int], Example], num_examples: int, batch_size: int, seed: int
) -> Callable[[int], list[Sample]]:
    """Every example once an epoch, in an order of its own; `draw` gives the example with a number in an epoch."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return Random(derive_seed(seed, epoch)).sample(range(num_examples), k=num_examples)

    def batch(step: int) -> list[Sample]:
        places = [divmod(place, num_examples) for place in range(step * batch_size, (step + 1) * batch_size)]
        drawn = [draw(order(epoch)[place], epoch) for epoch, place in places]
        # A batch larger than the data holds an example twice: trees of their own keep pairs together.
        return [replace(sample, tree=f"{n}/{sample.tree}") for n, example in enumerate(drawn) for sample in example]

    return batch


# ---- from questions


def _transcripts(run: Run, method: SFTConfig, phase: str) -> Source:
    """Role transcripts of the team's own episodes, written anew for each step."""
    demonstrator = build_demonstrator(run, method)
    tasks = training_tasks(run)

    def batch(step: int) -> list[Sample]:
        rng = Random(derive_seed(run.config.seed, phase, step))
        chosen = rng.choices(tasks, k=method.batch_size)
        seeds = [derive_seed(run.config.seed, phase, step, number) for number in range(len(chosen))]
        return [
            sample
            for task, seed in zip(chosen, seeds, strict=True)
            for sample in demonstrate(task, run.team, demonstrator, seed)
        ]

    @cache  # a warm start never asks
    def held_out() -> list[Sample]:
        tasks = enumerate(run.test_tasks[: run.config.evaluation.num_tasks])
        seeded = [(task, derive_seed(run.config.evaluation.seed, number)) for number, task in tasks]
        return [sample for task, seed in seeded for sample in demonstrate(task, run.team, demonstrator, seed)]

    return Source(batch=batch, held_out=held_out)


def training_tasks(run: Run) -> tuple[Task, ...]:
    """The training questions. Raises DataError when there are none."""
    if not run.train_tasks:
        raise DataError("data.num_train=0: training needs questions; set data.num_train to at least 1")
    return run.train_tasks


def build_demonstrator(run: Run, method: OfflineConfig) -> Demonstrator:
    """Who writes the transcripts: the puzzle's own demonstrator where the tiny model reads it, or the reference solutions."""
    data, compact = run.config.data, isinstance(run.team.template, CompactTemplate)
    if isinstance(data, RingConfig):
        return RingDemonstrator(modulus=data.modulus, slip_rate=method.slip_rate, wrong_rate=method.wrong_rate)
    if isinstance(data, ReasoningGymConfig) and compact and data.name in PUZZLES:
        rules = PUZZLES[data.name]
        return PlanningDemonstrator(rules=rules, grade=grade, slip_rate=method.slip_rate, wrong_rate=method.wrong_rate)
    return ReferenceDemonstrator(grade=grade, wrong_rate=method.wrong_rate, compact=compact)


def _judged_answers(run: Run, method: OfflineMethod) -> Callable[[Task, int], Example]:
    """The first agent's right and wrong answers to a question, new ones each epoch: pairs, outcomes or judged steps."""
    demonstrator = build_demonstrator(run, method)

    def example(task: Task, epoch: int) -> Example:
        rng = Random(derive_seed(run.config.data.seed, "answers", task.id, epoch))
        if isinstance(method, ProcessRewardConfig):
            return (_judged_steps(run, task, demonstrator, rng, right=rng.random() >= method.wrong_rate),)
        right, wrong = (demonstrator.answer(task, rng, right=truth) for truth in (True, False))
        return _for_method(method, (_answer(run, task, right, 1.0), _answer(run, task, wrong, 0.0)))

    return example


def _answer(run: Run, task: Task, text: str, label: float) -> Sample:
    agent = next(iter(run.team.agents.values()))
    prompt_ids, prompt_spans = run.team.prompt(task, agent, ())
    return Sample(
        id=f"{task.id}/{label:g}", tree=task.id, agent=agent.name, policy=agent.policy, prompt_ids=prompt_ids,
        prompt_spans=prompt_spans, completion_ids=run.team.template.write(text), label=label,
    )  # fmt: skip


def _judged_steps(run: Run, task: Task, demonstrator: Demonstrator, rng: Random, *, right: bool) -> Sample:
    """A ring answer whose digits are its steps."""
    assert isinstance(demonstrator, RingDemonstrator)
    if not isinstance(run.team.template, CompactTemplate):
        raise ConfigError("data.kind=ring with method.kind=prm: only the tiny model's answers are digits; set data.kind=steps")
    text = demonstrator.answer(task, rng, right=right)
    sample = _answer(run, task, text, float(right))
    return scored(sample, at=range(len(text)), labels=[float(holds) for holds in demonstrator.steps(task, text)])


def _for_method(method: OfflineMethod, samples: Example) -> Example:
    """Answers as they are for DPO; for a reward model, with a place where their score is read."""
    return tuple(scored(sample) for sample in samples) if isinstance(method, RewardModelConfig) else samples


# ---- from rows


def _records(run: Run, method: OfflineMethod) -> tuple[list[Example], list[Example]]:
    data = run.config.data
    assert isinstance(data, RecordConfig)
    tokenizer = run.tokenizer
    limits: dict[str, Any] = {"num_train": data.num_train, "num_test": data.num_test, "seed": data.seed}
    made: list[list[Example]]
    if isinstance(data, DocumentsConfig) and isinstance(method, SFTConfig):
        settings: dict[str, Any] = {"train_on": method.train_on, "chat": bool(tokenizer.chat_template)}
        parts = load_documents(data.path, **limits)
        made = [[(document_sample(r, tokenizer, **(settings | _speaker(run, r.agent))),) for r in part] for part in parts]
    elif isinstance(data, StepsConfig):
        solutions = load_steps(data.path, **limits)
        who = _speaker(run)
        made = [[(step_sample(row, tokenizer, separator=data.separator, **who),) for row in part] for part in solutions]
    else:
        rows = load_preferences(data.path, **limits)
        made = [[_preference(run, row, method) for row in part] for part in rows]
    train, test = (_short_enough(run, part) for part in made)
    for part, key in ((train, "num_train"), (test, "num_test")):
        if not part:
            raise DataError(f"data.path={data.path}: of data.{key} no record is left; raise data.{key} or data.max_length")
    return train, test


def _preference(run: Run, row: Pair | Unpaired, method: OfflineMethod) -> Example:
    """A pair, or a single answer where the method can learn from one; SFT (a warm start) learns the better answer."""
    who, chat = _speaker(run, row.agent), bool(run.tokenizer.chat_template)
    if isinstance(row, Pair) and isinstance(method, SFTConfig):
        return pair_samples(row, run.tokenizer, chat=chat and bool(row.prompt), **who)[:1]
    if isinstance(row, Pair):
        return _for_method(method, pair_samples(row, run.tokenizer, chat=chat and bool(row.prompt), **who))
    alone = isinstance(method, DPOConfig) and "kto" in method.losses
    alone |= isinstance(method, RewardModelConfig) and method.objective == "outcome"
    if not alone:
        remedy = "method.losses={kto: 1.0}" if isinstance(method, DPOConfig) else "method.objective=outcome"
        raise DataError(f"data.path={run.config.data.path}: its rows are single answers, not pairs; set {remedy}")  # type: ignore[union-attr]
    return _for_method(method, (unpaired_sample(row, run.tokenizer, chat=chat, **who),))


def _speaker(run: Run, name: str = "") -> dict[str, str]:
    """Rows speak for the agent that they name, else for the team's first one. Raises DataError for a name not in the team."""
    agents = run.team.agents
    if name and name not in agents:
        raise DataError(
            f"data.path={run.config.data.path}: a row speaks for agent {name!r}; expected one of {list(agents)}: "  # type: ignore[union-attr]
            "name the team that it was collected with in team.agents, or leave the column out"
        )
    agent = agents[name] if name else next(iter(agents.values()))
    return {"policy": agent.policy, "agent": agent.name}


def _short_enough(run: Run, examples: Sequence[Example]) -> list[Example]:
    """Those within data.max_length; how many are not is said."""
    limit = run.config.data.max_length  # type: ignore[union-attr]
    kept = [example for example in examples if not limit or max(map(_length, example)) <= limit]
    if len(kept) < len(examples) and run.world.is_first:
        run.console.print(
            f"[yellow]{len(examples) - len(kept)} of {len(examples)} records have more than data.max_length={limit} tokens "
            "and are left out[/yellow]"
        )
    return kept


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)
