"""Text of data sets as token ids, and which of them an assistant wrote.

Masks come from the structure of a conversation, never from token values: an end-of-turn token is trained on although it may
also be the padding token. Messages cannot hold control tokens of the tokenizer (a blank is put inside them); plain strings
are encoded as they stand, for they may be conversations that were rendered before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers.models import WordLevel

from mas_hpc.data.files import Row
from mas_hpc.errors import DataError
from mas_hpc.types import Message

Text = str | tuple[Message, ...]
"""A plain string, or a conversation."""
Ids = tuple[int, ...]


def read_text(row: Row, column: str, remedy: str) -> Text:
    """The column as a string or as messages, neither empty. Raises DataError naming the row."""
    value = row.value(column, remedy)
    text: Text | None = None
    if isinstance(value, str):
        text = value if value.strip() else None
    elif isinstance(value, Sequence) and value and all(isinstance(message, Mapping) for message in value):
        text = tuple(_message(message, f"{row.where}: column {column!r}") for message in value)
    if text is None:
        raise DataError(
            f"{row.where}: column {column!r} holds {value!r:.60}; expected text, or a list of messages with role and content"
        )
    return text


def read_pair(row: Row, prompt_key: str, completion_key: str, remedy: str) -> tuple[Text, Text]:
    """Prompt and completion, both strings or both messages: a string prompt beside messages is one of a user."""
    prompt, completion = read_text(row, prompt_key, remedy), read_text(row, completion_key, remedy)
    if isinstance(completion, str) and not isinstance(prompt, str):
        raise DataError(f"{row.where}: {prompt_key!r} is a list of messages and {completion_key!r} is text; give both alike")
    return (prompt if isinstance(completion, str) else as_messages(prompt, "user")), completion


def _message(value: Mapping[str, Any], where: str) -> Message:
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or value.get("tool_calls"):
        raise DataError(f"{where} has a message {dict(value)!r:.80}; expected role and content as text, and no tool calls")
    if role == "assistant" and not content.strip():
        raise DataError(f"{where} has an assistant's message without content; leave the row out")
    return Message(role=role, content=content)


def as_messages(text: Text, role: str) -> tuple[Message, ...]:
    """A conversation as it is; a string as one message of `role`."""
    return (Message(role=role, content=text),) if isinstance(text, str) else text


def plain(text: str, tokenizer: Any) -> str:
    """The text with a blank inside each control token, so that it cannot end its own message."""
    for token in _control_tokens(tokenizer):
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode(text: str, tokenizer: Any) -> Ids:
    """Ids without BOS and EOS. Raises DataError for what a fixed alphabet (the tiny model's) does not have."""
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, WordLevel) and model.unk_token not in (vocabulary := tokenizer.get_vocab()):
        unknown = sorted(set(text) - set(vocabulary))
        if unknown:
            alphabet = sorted(token for token in vocabulary if len(token) == 1)
            raise DataError(
                f"{text!r:.60}: characters {unknown} are not in the model's alphabet {alphabet}; "
                "set model.path to a model that reads any text"
            )
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def plain_ids(text: str, tokenizer: Any, *, begins: bool = True, ends: bool = True) -> Ids:
    """The text; if it begins, after exactly one BOS where the tokenizer adds one; if it ends, with exactly one EOS."""
    ids = encode(text, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begins and bos is not None and ids[:1] != (bos,) and tokenizer.encode("")[:1] == [bos]:
        ids = (bos, *ids)
    if ends and eos is None:
        raise DataError("model.path: its tokenizer has no EOS token, so a text cannot end; set eos_token in its files")
    return (*ids, eos) if ends and ids[-1:] != (eos,) else ids


def render(messages: Sequence[Message], tokenizer: Any, *, where: str = "a conversation") -> tuple[Ids, tuple[bool, ...]]:
    """Return (ids, which of them the assistant wrote, end-of-turn tokens included), of equal length.

    The template's own {% generation %} blocks say so if it has them. Else the conversation cut after an assistant's message,
    less what follows its end-of-turn token, must be a prefix of the whole, and so must the prompt before the message: what
    lies between is the assistant's. Raises DataError naming `where` and the template, and when the mask is empty.
    """
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template() if tokenizer.chat_template else ""):
        rendered = _apply(messages, tokenizer, where, masked=True)
        ids, mask = _one_bos(rendered["input_ids"], tokenizer, where), [bool(flag) for flag in rendered["assistant_masks"]]
    else:
        ids = _ids(messages, tokenizer, where)
        mask = [False] * len(ids)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                start, end = _turn(ids, messages, index, tokenizer, where)
                mask[start:end] = [True] * (end - start)
    if not any(mask):
        roles = [message.role for message in messages]
        raise DataError(f"{where}: the chat template marks no token as the assistant's; the roles are {roles}")
    return ids, tuple(mask)


def _turn(ids: Ids, messages: Sequence[Message], index: int, tokenizer: Any, where: str) -> tuple[int, int]:
    """Where message `index` begins in `ids`, after the generation prompt, and ends, after its end-of-turn token."""
    prompt = render_prompt(messages[:index], tokenizer, where=where)
    last = index == len(messages) - 1
    cut = ids if last else _ids(messages[: index + 1], tokenizer, where)
    end_of_turn = _end_of_turn(tokenizer, where)
    end = max((at + 1 for at in range(len(prompt), len(cut)) if cut[at] == end_of_turn), default=0)
    if not end or ids[: len(prompt)] != prompt or ids[:end] != cut[:end]:
        raise DataError(
            f"{where}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} renders a conversation cut after "
            f"message {index + 1} otherwise than the whole, so what the assistant wrote is unknown; put "
            "{% generation %} blocks into the template, or train on single answers"
        )
    return len(prompt), end


def render_prompt(messages: Sequence[Message], tokenizer: Any, *, where: str = "a conversation") -> Ids:
    """Ids of the conversation and of the opening of the assistant's next message."""
    return _ids(messages, tokenizer, where, opens=True)


def render_pair(prompt: Text, completion: Text, tokenizer: Any, *, where: str = "a row") -> tuple[Ids, Ids]:
    """Return (prompt ids, completion ids), the last one of which ends the turn (messages) or is EOS (strings).

    Strings are encoded apart and joined: no token spans the boundary, as none does when a model continues a prompt.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return plain_ids(prompt, tokenizer, ends=False), plain_ids(completion, tokenizer, begins=False)
    assert isinstance(prompt, tuple) and isinstance(completion, tuple), "both alike"
    roles = [message.role for message in (*prompt[-1:], *completion)]
    if len(roles) < 2 or roles[0] == "assistant" or {roles[1], roles[-1]} != {"assistant"}:
        raise DataError(
            f"{where}: the roles from the end of the prompt are {roles}; expected a completion that begins and ends with an "
            "assistant's message, after a message of another role"
        )
    whole = (*prompt, *completion)
    ids = _ids(whole, tokenizer, where)
    start, end = _turn(ids, whole, len(prompt), tokenizer, where)
    if len(completion) > 1:
        _, end = _turn(ids, whole, len(whole) - 1, tokenizer, where)
    return ids[:start], ids[start:end]


def _ids(messages: Sequence[Message], tokenizer: Any, where: str, *, opens: bool = False) -> Ids:
    """The rendered conversation's ids. Whether it begins with BOS is the template's to say, as in rollouts.

    Where a token would span the opening of the assistant's last message and its content (a line end and one more), both are
    encoded apart, as they are when a model continues the prompt.
    """
    text = _apply(messages, tokenizer, where, opens=opens)
    ids = encode(text, tokenizer)
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=0)
    if last:
        before = _apply(messages[:last], tokenizer, where, opens=True)
        prompt = _ids(messages[:last], tokenizer, where, opens=True)
        if text.startswith(before) and ids[: len(prompt)] != prompt:
            ids = prompt + encode(text[len(before) :], tokenizer)
    return _one_bos(ids, tokenizer, where)


def _one_bos(ids: Sequence[int], tokenizer: Any, where: str) -> Ids:
    if tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        raise DataError(f"{where}: the chat template begins with two BOS tokens; take one out of the template")
    return tuple(ids)


def _apply(
    messages: Sequence[Message], tokenizer: Any, where: str,
    *, opens: bool = False, masked: bool = False,
) -> Any:  # fmt: skip
    """The text, or if `masked`, a mapping of ids and the template's mask; `opens` adds the assistant's next opening."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a list of messages, but the tokenizer has no chat template; choose an instruction-tuned model, "
            "or give text instead of messages"
        )
    if not messages or messages[0].role == "assistant":
        raise DataError(f"{where} begins with an assistant's message; expected one of a user or the system before it")
    for before, after in pairwise(messages):
        if before.role == after.role == "assistant":
            raise DataError(f"{where} has two messages of the assistant in a row; join them")
    plain_messages = [{"role": message.role, "content": plain(message.content, tokenizer)} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            plain_messages, tokenize=masked, add_generation_prompt=opens,
            return_dict=masked, return_assistant_tokens_mask=masked,
        )  # fmt: skip
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses the roles {[m.role for m in messages]}: {error}") from None


def _end_of_turn(tokenizer: Any, where: str) -> int:
    """The control token that the template puts after an assistant's message."""
    probe = (Message(role="user", content="QUESTION-MARK"), Message(role="assistant", content="ANSWER-MARK"))
    _, found, tail = _apply(probe, tokenizer, where).rpartition("ANSWER-MARK")
    ids = encode(tail, tokenizer)
    if not found or not ids or ids[0] not in _control_tokens(tokenizer).values():
        raise DataError(
            f"{where}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} ends an assistant's message with "
            f"{tail!r:.40}; expected a special token, for text may hold anything else"
        )
    return ids[0]
