"""Prompts continue sampled tokens, and text is read as documented."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import ChatTemplate, CompactTemplate
from mas_hpc.answers import last_boxed, read_answer, read_verdict
from mas_hpc.config import ModelConfig
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.models.load import load_model
from mas_hpc.types import Task, Turn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TASK = Task(id="q", question="What is 6 x 7?", answer="42", compact="6")


def agent(role: str) -> Agent:
    return Agent(name=role, role=ROLES[role], policy="shared", sees="transcript", max_new_tokens=9, prompt=f"{role}!")


def turn(ids: tuple[int, ...], answer: str | None = None) -> Turn:
    return Turn(
        id="t", parent=None, task_id="q", agent="solver", policy="shared", index=0, prompt_ids=(), prompt_spans=(),
        completion_ids=ids, behavior_logprobs=(), text="", finish="stop", answer=answer,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<|im_start|>", "<|im_end|>"]
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    characters = Tokenizer(WordLevel({token: i for i, token in enumerate([*specials, *letters])}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<|im_end|>", chat_template=CHATML)


def test_a_chat_transcript_equals_the_rendered_conversation(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(chat_tokenizer)
    answer = template.write("It is 42.")
    ids = (*template.opening(TASK, agent("solver")), *answer, *template.cue(TASK, agent("critic"), turn(answer)))
    messages = [
        {"role": "user", "content": "What is 6 x 7?\n\nsolver!"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "critic!"},
    ]
    assert list(ids) == chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_cut_off_turn_is_closed_by_the_cue(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(chat_tokenizer)
    whole = template.write("It is 42.")
    cut = whole[:-1]
    assert (*cut, *template.cue(TASK, agent("critic"), turn(cut))) == (
        *whole,
        *template.cue(TASK, agent("critic"), turn(whole)),
    )
    assert template.stop_ids == (1,)


def test_a_tokenizer_without_a_template_is_refused(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer.backend_tokenizer))


@pytest.mark.parametrize(
    ("chat_template", "problem"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "does not keep all messages"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:", "expected a special token"),
    ],
    ids=["drops answers", "stops at a line end"],
)
def test_a_template_that_cannot_carry_a_transcript_is_refused(
    chat_tokenizer: PreTrainedTokenizerFast, chat_template: str, problem: str
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = chat_template
    with pytest.raises(ConfigError, match=problem):
        ChatTemplate(tokenizer)


def test_the_compact_transcript_closes_the_ring_before_a_verdict() -> None:
    _, tokenizer = load_model(ModelConfig(), seed=0)
    template = CompactTemplate(tokenizer)
    task = Task(id="r", question="", answer="012", compact="123", grader="ring")
    answer = template.write("012")
    ids = (*template.opening(task, agent("solver")), *answer, *template.cue(task, agent("critic"), turn(answer, "012")))
    assert tokenizer.decode(ids) == "Q123S0120C"
    assert (template.limit(task, agent("solver")), template.limit(task, agent("critic"))) == (3, 4)
    assert template.read(agent("critic"), "==!-") == (None, False)
    assert template.read(agent("critic"), "==!=") == (None, None)
    with pytest.raises(DataError, match=r"characters \['x'\]"):
        template.write("x")
    with pytest.raises(DataError, match=r"data\.kind ring and addition"):
        template.opening(Task(id="w", question="text", answer="1"), agent("solver"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("The answer is 1,250 dollars of 9", "1250"),
        ("3 + 4 = 7", "7"),
        ("the answer: 1/2", "1/2"),
        ("The answer is 8 + 10 = 18.\nCorrect.", "18"),
        ("the answer is $5 x 3 = $15 in 2 days", "15"),
        ("answer = .5", ".5"),
        ("so 3-4", "4"),
        ("it is -4", "-4"),
        ("no idea", None),
        (r"\boxed{}", None),
    ],
)
def test_answers_are_read_from_the_last_balanced_box_else_the_last_number(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


def test_verdicts_are_read_only_when_stated() -> None:
    assert read_verdict("VERDICT: incorrect\nNo:\nVERDICT: CORRECT") is True
    assert read_verdict('I end with "VERDICT: CORRECT" or "VERDICT: INCORRECT".') is None
    assert read_verdict("**Verdict**: INCORRECT") is False
    assert read_verdict("this is correct") is None
    assert last_boxed("no box") is None
