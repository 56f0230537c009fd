"""Preferences: pairs of answers to one prompt, and single answers that are wanted or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mas_hpc.data.conversations import Ids, Text, as_messages, plain_ids, read_pair, read_text, render_pair
from mas_hpc.data.files import Row, hold_out, read_rows
from mas_hpc.errors import DataError
from mas_hpc.prefix_tree import common_length
from mas_hpc.types import Message, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One prompt with a better and a worse answer.

    Example: Pair(id="train/1", prompt="What is 6 x 7?", chosen="42", rejected="41")
    """

    id: str
    prompt: Text
    """Empty for strings without a column `prompt`: it is then what the token ids of both have in common."""
    chosen: Text
    rejected: Text
    margin: float = 0.0
    """How much better the chosen answer is."""
    agent: str = ""
    """Who of the team speaks; empty: its first agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpaired:
    """One answer, wanted or not.

    Example: Unpaired(id="train/1", prompt="What is 6 x 7?", completion="42", label=True)
    """

    id: str
    prompt: Text
    completion: Text
    label: bool
    agent: str = ""
    """Who of the team speaks; empty: its first agent."""


def load_preferences(
    path: str, *, num_train: int, num_test: int, seed: int
) -> tuple[tuple[Pair | Unpaired, ...], tuple[Pair | Unpaired, ...]]:
    """Return (training, test) records, all pairs or all unpaired; those of one prompt stay on one side.

    Pairs have columns `chosen` and `rejected`, `prompt` if it is explicit, and `margin` if there is one: all strings or
    lists of messages; a string prompt beside messages is one of a user, or is repeated in both lists. Unpaired rows have
    `prompt`, `completion` and `label`: true or false, or 1 or 0. `path` as in files.read_rows, limits as in files.hold_out.
    Raises DataError naming the row, and for pairs of identical answers all such rows.
    """
    splits: dict[str, list[Pair | Unpaired]] = {
        name: [_unpaired(row) if "label" in row.values and "chosen" not in row.values else _pair(row) for row in rows]
        for name, rows in read_rows(path).items()
    }
    records = [record for part in splits.values() for record in part]
    if len({type(record) for record in records}) > 1:
        raise DataError(f"{path}: some rows are pairs and some are single answers with a label; make two files of them")
    same = [pair.id for pair in records if isinstance(pair, Pair) and pair.chosen == pair.rejected]
    if same:
        raise DataError(
            f"{path}: {len(same)} rows whose chosen and rejected answers are identical, so that they prefer nothing: "
            f"{', '.join(same[:5])}{', ...' if len(same) > 5 else ''}; leave them out"
        )
    return hold_out(splits, _question, path=path, num_train=num_train, num_test=num_test, seed=seed, noun="preferences")


def _pair(row: Row) -> Pair:
    remedy = "expected chosen, rejected and, if it is not part of both, prompt"
    chosen, rejected = read_text(row, "chosen", remedy), read_text(row, "rejected", remedy)
    prompt = read_text(row, "prompt", remedy) if row.values.get("prompt") is not None else ""
    margin = row.values.get("margin") or 0.0
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"{row.where}: column 'margin' holds {margin!r:.60}; expected a finite number")
    if isinstance(chosen, str) != isinstance(rejected, str) or (isinstance(chosen, str) and not isinstance(prompt, str)):
        raise DataError(f"{row.where}: of prompt, chosen and rejected some are text and some lists of messages; give all alike")
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        prompt, chosen, rejected = _conversations(prompt, chosen, rejected, row)
    return Pair(id=row.id, prompt=prompt, chosen=chosen, rejected=rejected, margin=float(margin), agent=row.agent)


def _conversations(
    prompt: Text, chosen: tuple[Message, ...], rejected: tuple[Message, ...], row: Row
) -> tuple[Text, Text, Text]:
    """Prompt and answers, where the prompt may be repeated in both, or be there only."""
    if prompt and chosen[0].role == rejected[0].role == "assistant":
        return as_messages(prompt, "user"), chosen, rejected
    if prompt and not isinstance(prompt, str):
        first = [chosen[0].role, rejected[0].role]
        raise DataError(f"{row.where}: chosen and rejected begin with {first}; expected an assistant's message after a prompt")
    length = common_length(chosen, rejected)
    if chosen == rejected:  # refused for all rows at once
        length = len(chosen) - 1
    if not length or length == min(len(chosen), len(rejected)):
        raise DataError(
            f"{row.where}: chosen and rejected have {length} of {len(chosen)} and {len(rejected)} messages in common; "
            "expected a common prompt, and at least one more message in each"
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _unpaired(row: Row) -> Unpaired:
    prompt, completion = read_pair(row, "prompt", "completion", "expected prompt, completion and label")
    label = row.values["label"]
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise DataError(f"{row.where}: column 'label' holds {label!r:.60}; expected true or false")
    return Unpaired(id=row.id, prompt=prompt, completion=completion, label=bool(label), agent=row.agent)


def _question(record: Pair | Unpaired) -> Text:
    """The prompt; without one, the words that both answers begin with."""
    if isinstance(record, Unpaired) or record.prompt:
        return record.prompt
    assert isinstance(record.chosen, str) and isinstance(record.rejected, str), "messages have a prompt"
    words = record.chosen.split(" ")
    return " ".join(words[: common_length(words, record.rejected.split(" "))])


def pair_samples(pair: Pair, tokenizer: Any, *, policy: str, agent: str, chat: bool = False) -> tuple[Sample, Sample]:
    """Return (chosen, label 1 and the margin; rejected, label 0): one tree, one prompt. `chat` as in document_sample.

    Raises DataError naming the pair for answers of equal tokens, which prefer nothing, and when no prompt is common.
    """
    where = f"pair {pair.id}"
    if chat and not pair.prompt:
        raise DataError(f"{where}: without a column prompt nothing says what the user's message is; add one, or use messages")
    if pair.prompt:
        (prompt, chosen), (_, rejected) = (
            _answer(pair.prompt, answer, tokenizer, chat, where) for answer in (pair.chosen, pair.rejected)
        )
    else:
        assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str), "messages have a prompt"
        chosen, rejected = plain_ids(pair.chosen, tokenizer), plain_ids(pair.rejected, tokenizer)
        length = common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected have the same tokens, so it prefers nothing; leave it out")
    if not prompt:
        raise DataError(f"{where}: chosen and rejected have no first token in common; add a column prompt")
    better, worse = (
        Sample(
            id=f"{pair.id}/{name}", tree=pair.id, policy=policy, agent=agent,
            prompt_ids=prompt, prompt_spans=(("", len(prompt)),), completion_ids=ids, label=label, margin=margin,
        )
        for name, ids, label, margin in (("chosen", chosen, 1.0, pair.margin), ("rejected", rejected, 0.0, 0.0))
    )  # fmt: skip
    return better, worse


def unpaired_sample(answer: Unpaired, tokenizer: Any, *, policy: str, agent: str, chat: bool = False) -> Sample:
    """The answer as a sample whose label is 1 or 0. `chat` as in document_sample."""
    where = f"answer {answer.id}"
    prompt, completion = _answer(answer.prompt, answer.completion, tokenizer, chat, where)
    return Sample(
        id=answer.id, tree=answer.id, policy=policy, agent=agent,
        prompt_ids=prompt, prompt_spans=(("", len(prompt)),), completion_ids=completion, label=float(answer.label),
    )  # fmt: skip


def _answer(prompt: Text, completion: Text, tokenizer: Any, chat: bool, where: str) -> tuple[Ids, Ids]:
    if chat:
        prompt, completion = as_messages(prompt, "user"), as_messages(completion, "assistant")
    return render_pair(prompt, completion, tokenizer, where=where)


def scored(sample: Sample, *, at: Sequence[int] | None = None, labels: Sequence[float] = ()) -> Sample:
    """The sample with a trained slot wherever a score is read from the hidden state: TokenTree.predictor_N is that token.

    `at` are increasing indices into completion_ids, None the last token of prompt and completion; `labels` one a slot, which
    becomes the column `label`. A score is read where the next token would be predicted; after the last token a slot with
    id 0 stands for it, which is never run, for a path ends where its last target is predicted. Other columns and
    behaviour log-probs, which belong to trained tokens, are dropped.
    """
    last = len(sample.completion_ids) - 1
    places = [last] if at is None else list(at)
    assert places == sorted(set(places)), "increasing"
    assert -1 <= places[0] <= places[-1] <= last, "inside the completion, or -1, the last token of the prompt"
    ids = (*sample.completion_ids, 0)[: places[-1] + 2]
    slots = {place + 1 for place in places}
    columns = {}
    if labels:
        by_slot = dict(zip(sorted(slots), labels, strict=True))
        columns = {"label": tuple(by_slot.get(index, math.nan) for index in range(len(ids)))}
    mask = tuple(index in slots for index in range(len(ids)))
    return replace(sample, completion_ids=ids, loss_mask=mask, columns=columns, behavior_logprobs=())
