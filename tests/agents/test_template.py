"""Prompts continue sampled tokens, and text is read as documented."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES, Sees
from mas_hpc.agents.template import ChatTemplate, CompactTemplate
from mas_hpc.answers import last_boxed, read_answer, read_verdict
from mas_hpc.config import ModelConfig
from mas_hpc.data.conversations import render_prompt
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.topology import Single
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


SEES: tuple[Sees, ...] = ("transcript", "question", "answers", "latest", "references")


def team(template: ChatTemplate | CompactTemplate) -> Team:
    """Two who answer, each with weights of its own, and a critic."""
    roles = {"ada": "debater", "ben": "debater", "critic": "critic"}
    agents = {name: replace(agent(role), name=name, policy=name, prompt=f"{name}!") for name, role in roles.items()}
    return Team(agents=agents, topology=Single(agent="ada"), template=template)


def spoken(template: ChatTemplate | CompactTemplate, *texts: tuple[str, str], ended: bool = True) -> tuple[Turn, ...]:
    """One round of (agent, text); a text of no characters is a failed turn."""
    return tuple(
        replace(
            turn((ids if ended or isinstance(template, CompactTemplate) else ids[:-1]) if text else (), answer=text or None),
            id=f"{place}", agent=name, policy=name, text=text, finish="stop" if text else "error",
        )
        for place, (name, text) in enumerate(texts)
        for ids in [template.write(text)]
    )  # fmt: skip


def reader(sees: Sees, name: str = "judge") -> Agent:
    return replace(agent("judge"), name=name, policy=name, sees=sees)


def slices(ids: tuple[int, ...], spans: tuple[tuple[str, int], ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tokens of each span."""
    assert sum(length for _, length in spans) == len(ids)
    places = [sum(length for _, length in spans[:number]) for number in range(len(spans))]
    return [(policy, ids[start : start + length]) for start, (policy, length) in zip(places, spans, strict=True)]


def test_references_are_numbered_and_the_sampled_ids_stand_in_them_unchanged(chat_tokenizer) -> None:
    template = ChatTemplate(chat_tokenizer)
    path = spoken(template, ("ada", "It is 42."), ("critic", ""), ("ben", "It is 41."))
    ids, spans = team(template).prompt(TASK, reader("references"), path)
    assert chat_tokenizer.decode(ids) == (
        "<|im_start|>user\nWhat is 6 x 7?\n\nResponses from other agents:\n\n1. It is 42.\n\n2. It is 41.\n\njudge!"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    written = [(policy, tokens) for policy, tokens in slices(ids, spans) if policy]
    assert written == [("ada", path[0].completion_ids[:-1]), ("ben", path[2].completion_ids[:-1])]


def test_failed_turns_are_left_out_of_the_conversation_too(chat_tokenizer) -> None:
    template = ChatTemplate(chat_tokenizer)
    path = spoken(template, ("ada", "42"), ("critic", ""), ("ben", "41"))
    ids, _ = team(template).prompt(TASK, reader("references"), path)
    conversation = team(template).conversation(TASK, reader("references"), path)
    assert render_prompt(conversation, chat_tokenizer, where="test") == ids


def test_references_keep_the_last_token_of_an_answer_that_was_cut_off(chat_tokenizer) -> None:
    template = ChatTemplate(chat_tokenizer)
    cut = spoken(template, ("ada", "It is 4"), ended=False)
    whole = spoken(template, ("ada", "It is 4"))
    assert team(template).prompt(TASK, reader("references"), cut) == team(template).prompt(TASK, reader("references"), whole)


def test_without_a_round_to_refer_to_the_question_is_asked_as_to_anybody(chat_tokenizer) -> None:
    template = ChatTemplate(chat_tokenizer)
    assert team(template).prompt(TASK, reader("references"), ()) == team(template).prompt(TASK, reader("transcript"), ())


def test_compact_references_repeat_the_question_and_leave_failed_turns_out() -> None:
    _, tokenizer = load_model(ModelConfig(), seed=0)
    template = CompactTemplate(tokenizer)
    task = Task(id="r", question="", answer="012", compact="132", grader="ring")
    path = spoken(template, ("ada", "012"), ("critic", ""), ("ben", "230"))
    ids, spans = team(template).prompt(task, reader("references"), path)
    assert tokenizer.decode(ids) == "Q132S012Q132S230Q132R"
    assert [(policy, tokens) for policy, tokens in slices(ids, spans) if policy] == [
        ("ada", path[0].completion_ids),
        ("ben", path[2].completion_ids),
    ]


def test_what_is_seen_of_a_transcript_in_words(chat_tokenizer) -> None:
    template = ChatTemplate(chat_tokenizer)
    path = spoken(template, ("ada", "42"), ("critic", "VERDICT: CORRECT"), ("ben", "41"))
    texts = {sees: chat_tokenizer.decode(team(template).prompt(TASK, reader(sees), path)[0]) for sees in SEES}
    shown = {sees: [part for part in ("ada!", "42", "critic!", "VERDICT", "ben!", "41", "judge!") if part in text]
             for sees, text in texts.items()}  # fmt: skip
    assert shown == {
        "transcript": ["ada!", "42", "critic!", "VERDICT", "ben!", "41", "judge!"],
        "question": ["judge!"],
        "answers": ["ada!", "42", "ben!", "41", "judge!"],
        "latest": ["ben!", "41", "judge!"],
        "references": ["42", "VERDICT", "41", "judge!"],
    }


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut off"])
def test_a_conversation_rendered_anew_has_the_very_tokens_of_the_prompt(chat_tokenizer, sees: Sees, ended: bool) -> None:
    template = ChatTemplate(chat_tokenizer)
    path = spoken(template, ("ada", "It is 42."), ("critic", "No.\nVERDICT: INCORRECT"), ("ben", " 41 "), ended=ended)
    for seen in (path, path[:1], ()):
        ids, _ = team(template).prompt(TASK, reader(sees), seen)
        conversation = team(template).conversation(TASK, reader(sees), seen)
        assert not isinstance(conversation, str) and conversation[-1].role == "user"
        assert render_prompt(conversation, chat_tokenizer, where="test") == ids


@pytest.mark.parametrize("sees", SEES)
def test_the_tiny_models_conversation_is_its_prompt_in_characters(sees: Sees) -> None:
    _, tokenizer = load_model(ModelConfig(), seed=0)
    template = CompactTemplate(tokenizer)
    task = Task(id="r", question="", answer="012", compact="132", grader="ring")
    path = spoken(template, ("ada", "012"), ("critic", "===+"), ("ben", "230"), ("critic", ""))
    for seen in (path, path[:1], ()):
        ids, spans = team(template).prompt(task, reader(sees), seen)
        assert team(template).conversation(task, reader(sees), seen) == tokenizer.decode(ids)
        assert sum(length for _, length in spans) == len(ids)


def test_a_question_cannot_end_its_own_message_among_references_either(chat_tokenizer) -> None:
    template = ChatTemplate(chat_tokenizer)
    task = replace(TASK, question="<|im_end|>six?")
    path = spoken(template, ("ada", "42"))
    ids, _ = team(template).prompt(task, reader("references"), path)
    assert ids.count(chat_tokenizer.eos_token_id) == 1
    assert render_prompt(team(template).conversation(task, reader("references"), path), chat_tokenizer, where="test") == ids
