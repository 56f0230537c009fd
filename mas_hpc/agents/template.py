"""How a state becomes prompt tokens, and text becomes an answer or a verdict. Nothing is ever tokenized twice.

A transcript is opening(task) + completion + cue(next agent) + completion + ...: sampled ids stay as they were sampled,
and only the cue between them is encoded, so that a child's prompt continues its parent's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from mas_hpc.agents.agent import Agent
from mas_hpc.answers import read_answer, read_verdict
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.types import Message, Task, Turn


class Template(Protocol):
    """The dialect of a team: chat (models with a chat template) or compact (the tiny model)."""

    stop_ids: tuple[int, ...]

    def opening(self, task: Task, agent: Agent) -> tuple[int, ...]:
        """Prompt of an agent that reads only the question."""
        ...

    def cue(self, task: Task, agent: Agent, previous: Turn) -> tuple[int, ...]:
        """Tokens between the completion of `previous` and the agent's own."""
        ...

    def references(self, task: Task, agent: Agent, seen: Sequence[Turn]) -> list[tuple[str, tuple[int, ...]]]:
        """Prompt of an agent that reads `seen` as numbered references: runs of (policy that wrote it, "" for ours; tokens)."""
        ...

    def conversation(
        self, task: Task, agent: Agent, speakers: Sequence[Agent], seen: Sequence[Turn]
    ) -> str | tuple[Message, ...]:
        """The agent's prompt as data sets hold it: messages, or plain text. `speakers` wrote `seen`."""
        ...

    def write(self, text: str) -> tuple[int, ...]:
        """A completion that ends by itself, as demonstrations need it."""
        ...

    def limit(self, task: Task, agent: Agent) -> int:
        """Most tokens that the agent may write."""
        ...

    def read(self, agent: Agent, text: str) -> tuple[str | None, bool | None]:
        """(answer, verdict) of a completion; None for what the role does not give or what is unreadable."""
        ...


class ChatTemplate:
    """Each agent's instruction is a user message, each completion an assistant message of one shared conversation."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("model.path: its tokenizer has no chat template; choose an instruction-tuned model, or `tiny`")
        self._tokenizer = tokenizer
        messages = [
            {"role": "user", "content": "QUESTION-MARK"},
            {"role": "assistant", "content": "ANSWER-MARK"},
            {"role": "user", "content": "CUE-MARK"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parts = re.fullmatch("(.*)QUESTION-MARK.*ANSWER-MARK(.+)CUE-MARK(.*)", text, re.DOTALL)
        if parts is None:
            raise ConfigError(f"model.path: its chat template does not keep all messages of a conversation: {text!r}")
        self._head, self._between, self._tail = parts.groups()
        end_of_turn = self._encode(self._between)[0]
        if end_of_turn != tokenizer.eos_token_id and end_of_turn not in tokenizer.added_tokens_decoder:
            raise ConfigError(
                f"model.path: its chat template ends an assistant's message with {self._between!r}; expected a special "
                "token, for text may hold anything else"
            )
        self.stop_ids = tuple(sorted({tokenizer.eos_token_id, end_of_turn} - {None}))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def opening(self, task: Task, agent: Agent) -> tuple[int, ...]:
        """The question and the first agent's instruction as one user message."""
        return self._encode(f"{self._head}{self._plain(task.question)}\n\n{agent.instruction}{self._tail}")

    def references(self, task: Task, agent: Agent, seen: Sequence[Turn]) -> list[tuple[str, tuple[int, ...]]]:
        """The question, the responses numbered as in Mixture of Agents (arXiv 2406.04692), and the instruction: one message.

        Sampled ids stay as they are, but for the token that ended their turn; failed turns are left out.
        """
        runs = [("", self._encode(f"{self._head}{self._plain(task.question)}\n\nResponses from other agents:"))]
        for number, turn in enumerate((turn for turn in seen if turn.completion_ids), 1):
            ended = turn.completion_ids[-1] in self.stop_ids
            runs.append(("", self._encode(f"\n\n{number}. ")))
            runs.append((turn.policy, turn.completion_ids[:-1] if ended else turn.completion_ids))
        return [*runs, ("", self._encode(f"\n\n{agent.instruction}{self._tail}"))]

    def conversation(self, task: Task, agent: Agent, speakers: Sequence[Agent], seen: Sequence[Turn]) -> tuple[Message, ...]:
        """Instructions as a user's messages, completions as the assistant's."""
        if agent.sees == "references" and seen:
            numbered = [f"{number}. {turn.text}" for number, turn in enumerate((t for t in seen if t.completion_ids), 1)]
            parts = (f"{task.question}\n\nResponses from other agents:", *numbered, agent.instruction)
            return (Message(role="user", content="\n\n".join(parts)),)
        asked = [speaker.instruction for speaker in (*speakers, agent)]
        messages = [Message(role="user", content=f"{task.question}\n\n{asked[0]}")]
        for turn, instruction in zip(seen, asked[1:], strict=True):
            messages += [Message(role="assistant", content=turn.text), Message(role="user", content=instruction)]
        return tuple(messages)

    def _plain(self, text: str) -> str:
        """The text with a blank inside each control token, so that a question cannot end its own message."""
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def cue(self, task: Task, agent: Agent, previous: Turn) -> tuple[int, ...]:
        """End of the assistant message (unless it was sampled), the agent's instruction, start of the next one."""
        ids = self._encode(f"{self._between}{agent.instruction}{self._tail}")
        return ids[1:] if previous.completion_ids[-1:] == ids[:1] else ids

    def write(self, text: str) -> tuple[int, ...]:
        """The text and the end-of-turn token."""
        return (*self._encode(text), self._encode(self._between)[0])

    def limit(self, task: Task, agent: Agent) -> int:
        """The agent's own limit."""
        return agent.max_new_tokens

    def read(self, agent: Agent, text: str) -> tuple[str | None, bool | None]:
        """Answers as in answers.read_answer, verdicts as in answers.read_verdict."""
        if agent.role.produces == "answer":
            return read_answer(text), None
        return None, read_verdict(text)


class CompactTemplate:
    """One character a token and no end token: `Q31203S012300C===!!-Q31203R120211V=====+`.

    The question is repeated before an answer, and the answer's first digit before a verdict (it closes the ring), so
    that what a two-layer model must look up stands at constant distances.
    """

    stop_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any) -> None:
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()

    def write(self, text: str) -> tuple[int, ...]:
        """The characters' ids. Raises DataError naming characters outside the alphabet."""
        unknown = sorted(set(text) - set(self._vocabulary))
        if unknown:
            raise DataError(f"{text!r}: characters {unknown} are not in the tiny model's alphabet {sorted(self._vocabulary)}")
        return tuple(self._vocabulary[character] for character in text)

    def opening(self, task: Task, agent: Agent) -> tuple[int, ...]:
        """Question and cue letter."""
        if not task.compact:
            raise DataError(
                f"task {task.id}: the tiny model reads only data.kind ring and addition, and of reasoning_gym mini_sudoku and "
                "shortest_path; "
                "set model.path to a model with a chat template for other task sets"
            )
        return self.write(f"Q{task.compact}{agent.role.letter}")

    def cue(self, task: Task, agent: Agent, previous: Turn) -> tuple[int, ...]:
        """The question or the first digit again, then the cue letter."""
        lead = f"Q{task.compact}" if agent.role.produces == "answer" else (previous.answer or "")[:1]
        return self.write(lead + agent.role.letter)

    def references(self, task: Task, agent: Agent, seen: Sequence[Turn]) -> list[tuple[str, tuple[int, ...]]]:
        """The completions in order, each after its cue, then the agent's: `Q31203S012300Q31203S230122Q31203R`.

        Failed turns are left out.
        """
        lead = self.write(f"Q{task.compact}S")
        runs = [run for turn in seen if turn.completion_ids for run in (("", lead), (turn.policy, turn.completion_ids))]
        return [*runs, ("", self.opening(task, agent))]

    def conversation(self, task: Task, agent: Agent, speakers: Sequence[Agent], seen: Sequence[Turn]) -> str:
        """The prompt's characters."""
        if agent.sees == "references" and seen:
            ids = [token for _, run in self.references(task, agent, seen) for token in run]
        else:
            order = (*speakers, agent)
            ids = list(self.opening(task, order[0]))
            for turn, following in zip(seen, order[1:], strict=True):
                ids += [*turn.completion_ids, *self.cue(task, following, turn)]
        characters = {token: character for character, token in self._vocabulary.items()}
        return "".join(characters[token] for token in ids)

    def limit(self, task: Task, agent: Agent) -> int:
        """An answer is as long as the reference answer; a verdict is a mark for each of its characters, and + or -."""
        return min(agent.max_new_tokens, len(task.compact_answer or task.answer) + (agent.role.produces == "verdict"))

    def read(self, agent: Agent, text: str) -> tuple[str | None, bool | None]:
        """The answer is the text; the verdict is its last character, + or -."""
        if agent.role.produces == "answer":
            return text or None, None
        return None, {"+": True, "-": False}.get(text[-1:])
