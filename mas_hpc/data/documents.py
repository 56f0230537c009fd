"""Demonstrations: rows with `messages`, `prompt` and `completion`, or `text`, and the samples that they train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from mas_hpc.data.conversations import (
    Ids,
    Text,
    as_messages,
    plain_ids,
    read_pair,
    read_text,
    render,
    render_pair,
    render_prompt,
)
from mas_hpc.data.files import Row, hold_out, read_rows
from mas_hpc.errors import DataError
from mas_hpc.types import Sample

TrainOn = Literal["auto", "completion", "assistant", "all"]
"""auto: `completion` where there is a prompt, `assistant` for messages, `all` for text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One demonstration.

    Example: Document(id="train/1", prompt="What is 6 x 7?", completion="42")
    """

    id: str
    prompt: Text = ""
    """Empty for whole conversations (`messages`) and plain text (`text`)."""
    completion: Text
    agent: str = ""
    """Who of the team speaks; empty: its first agent."""

    @property
    def question(self) -> Text:
        """What is the same for documents that must not be on both sides of a split."""
        if self.prompt or isinstance(self.completion, str):
            return self.prompt or self.completion
        roles = [message.role for message in self.completion]
        return self.completion[: roles.index("assistant")]


def load_documents(
    path: str, *, num_train: int, num_test: int, seed: int,
    prompt_key: str = "prompt", completion_key: str = "completion",
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:  # fmt: skip
    """Return (training, test) documents in one of TRL's formats: `messages`; prompt and completion, both strings or both
    messages, under the keys given; or `text`. `path` as in files.read_rows, limits as in files.hold_out.

    Raises DataError naming the row.
    """
    splits = read_rows(path)
    documents = {name: [_document(row, prompt_key, completion_key) for row in rows] for name, rows in splits.items()}
    return hold_out(
        documents, lambda document: document.question,
        path=path, num_train=num_train, num_test=num_test, seed=seed, noun="documents",
    )  # fmt: skip


def _document(row: Row, prompt_key: str, completion_key: str) -> Document:
    if "messages" in row.values:
        messages = as_messages(read_text(row, "messages", ""), "user")
        if "assistant" not in [message.role for message in messages]:
            roles = sorted({message.role for message in messages})
            raise DataError(f"{row.where}: no message of role 'assistant' to train on; its roles are {roles}")
        return Document(id=row.id, agent=row.agent, completion=messages)
    if "text" in row.values and prompt_key not in row.values:
        return Document(id=row.id, agent=row.agent, completion=read_text(row, "text", ""))
    remedy = f"expected 'messages', 'text', or {prompt_key!r} and {completion_key!r}"
    prompt, completion = read_pair(row, prompt_key, completion_key, remedy)
    return Document(id=row.id, agent=row.agent, prompt=prompt, completion=completion)


def document_sample(
    document: Document, tokenizer: Any, *, policy: str, agent: str, train_on: TrainOn = "auto", chat: bool = False
) -> Sample:
    """The document as a sample: prompt_ids is all before the first trained token, loss_mask the trained ones after it.

    `completion` trains on all after the prompt, `assistant` on assistants' messages (after the prompt, if there is one),
    `all` on every token but the first, which nothing predicts. `chat` makes one user and one assistant message of a string
    prompt and completion. Raises DataError naming the document when no token is left to train on.
    """
    ids, mask = _trained(_chat(document) if chat else document, tokenizer, train_on)
    mask = (False, *mask[1:])
    if not any(mask):
        raise DataError(f"document {document.id}: of its {len(ids)} tokens none can be trained on; leave it out")
    start, end = mask.index(True), len(mask) - mask[::-1].index(True)
    trained = mask[start:end]
    return Sample(
        id=document.id, tree=document.id, agent=agent, policy=policy,
        prompt_ids=ids[:start], prompt_spans=(("", start),), completion_ids=ids[start:end],
        loss_mask=() if all(trained) else trained,
    )  # fmt: skip


def _chat(document: Document) -> Document:
    if not document.prompt:
        return document  # a text has no roles
    prompt, completion = as_messages(document.prompt, "user"), as_messages(document.completion, "assistant")
    return replace(document, prompt=prompt, completion=completion)


def _trained(document: Document, tokenizer: Any, train_on: TrainOn) -> tuple[Ids, tuple[bool, ...]]:
    """All ids, and which of them are trained on."""
    where = f"document {document.id}"
    is_text = isinstance(document.completion, str)
    if train_on == "auto":
        train_on = "completion" if document.prompt else "all" if is_text else "assistant"
    if train_on == "completion" and not document.prompt:
        raise DataError(f"{where}: train_on=completion needs a prompt, and it has none; use auto, assistant or all")
    if train_on == "assistant" and is_text:
        raise DataError(f"{where}: train_on=assistant needs messages, and it has text; use auto, completion or all")
    if train_on == "assistant":
        return _assistant(document, tokenizer, where)
    if document.prompt:
        prompt, completion = render_pair(document.prompt, document.completion, tokenizer, where=where)
        return prompt + completion, (train_on == "all",) * len(prompt) + (True,) * len(completion)
    if isinstance(document.completion, str):
        ids = plain_ids(document.completion, tokenizer)
        return ids, (True,) * len(ids)
    ids, _ = render(document.completion, tokenizer, where=where)
    return ids, (True,) * len(ids)


def _assistant(document: Document, tokenizer: Any, where: str) -> tuple[Ids, tuple[bool, ...]]:
    """All ids, and those of assistants' messages that are not in the prompt."""
    completion = as_messages(document.completion, "assistant")
    if not document.prompt:
        return render(completion, tokenizer, where=where)
    prompt = as_messages(document.prompt, "user")
    start = len(render_prompt(prompt, tokenizer, where=where))
    ids, mask = render((*prompt, *completion), tokenizer, where=where)
    return ids, (False,) * start + mask[start:]
