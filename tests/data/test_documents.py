"""Demonstrations of each format, and which of their tokens are trained on."""

from __future__ import annotations

import json

import pytest

from mas_hpc.data.documents import Document, document_sample, load_documents
from mas_hpc.data.token_tree import pack
from mas_hpc.errors import DataError
from mas_hpc.types import Message, Sample

USER, YES, AGAIN, NO = (
    Message(role=role, content=content)
    for role, content in (("user", "u"), ("assistant", "yes"), ("user", "v"), ("assistant", "no"))
)


def write(file, *rows):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def sample_of(document, tokenizer, **options):
    return document_sample(document, tokenizer, policy="shared", agent="solver", **options)


def targets(sample: Sample, tokenizer):
    tree = pack([sample], adapters={}, scope="speaker")
    return tokenizer.decode(tree.target_N.tolist())


@pytest.mark.parametrize(
    ("document", "train_on", "expected"),
    [
        (Document(id="d", prompt="ab", completion="cd"), "auto", "cd<|im_end|>"),
        (Document(id="d", prompt="ab", completion="cd"), "all", "abcd<|im_end|>"),
        (Document(id="d", completion="ab"), "auto", "ab<|im_end|>"),
        (Document(id="d", completion=(USER, YES, AGAIN, NO)), "auto", "yes<|im_end|>no<|im_end|>"),
        (Document(id="d", prompt=(USER, YES, AGAIN), completion=(NO,)), "auto", "no<|im_end|>"),
        (Document(id="d", prompt=(USER, YES, AGAIN), completion=(NO,)), "assistant", "no<|im_end|>"),
        (Document(id="d", prompt=(USER,), completion=(YES, AGAIN, NO)), "assistant", "yes<|im_end|>no<|im_end|>"),
    ],
)  # fmt: skip
def test_g11_the_trained_tokens_are_the_targets(make_tokenizer, document, train_on, expected):
    tokenizer = make_tokenizer(adds_bos=True)
    assert targets(sample_of(document, tokenizer, train_on=train_on), tokenizer) == expected


def test_all_of_a_conversation_but_its_first_token_can_be_trained_on(make_tokenizer):
    tokenizer = make_tokenizer()
    sample = sample_of(Document(id="d", completion=(USER, YES)), tokenizer, train_on="all")
    assert tokenizer.decode(sample.prompt_ids) == "<|im_start|>"
    assert tokenizer.decode(sample.completion_ids) == "user\nu<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


def test_without_bos_the_first_token_of_a_text_is_its_prompt(make_tokenizer):
    tokenizer = make_tokenizer(None)
    sample = sample_of(Document(id="d", completion="ab"), tokenizer)
    assert (tokenizer.decode(sample.prompt_ids), tokenizer.decode(sample.completion_ids)) == ("a", "b<|im_end|>")
    with pytest.raises(DataError, match="document d: of its 1 tokens none can be trained on"):
        sample_of(Document(id="d", completion="<|im_end|>"), tokenizer)


def test_strings_become_messages_on_request(make_tokenizer):
    tokenizer = make_tokenizer()
    sample = sample_of(Document(id="d", prompt="u", completion="yes"), tokenizer, chat=True)
    assert sample == sample_of(Document(id="d", prompt=(USER,), completion=(YES,)), tokenizer)
    assert tokenizer.decode(sample.prompt_ids) == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"


def test_a_choice_that_does_not_fit_the_format_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="train_on=completion needs a prompt"):
        sample_of(Document(id="d", completion="ab"), make_tokenizer(), train_on="completion")
    with pytest.raises(DataError, match="train_on=assistant needs messages"):
        sample_of(Document(id="d", prompt="ab", completion="cd"), make_tokenizer(), train_on="assistant")


def test_each_format_is_read_and_equal_prompts_stay_on_one_side(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "yes", "tool_calls": None}]
    path = write(tmp_path / "x.jsonl", {"messages": messages}, {"text": "t"}, {"prompt": "p", "completion": "c"})
    train, test = load_documents(path, num_train=2, num_test=1, seed=0)
    by_id = {document.id: document for document in train + test}
    assert by_id["x/1"].completion == (USER, YES)
    assert by_id["x/2"] == Document(id="x/2", completion="t")
    assert by_id["x/3"] == Document(id="x/3", prompt="p", completion="c")
    rows = [{"prompt": str(n % 4), "completion": str(n)} for n in range(12)]
    train, test = load_documents(write(tmp_path / "y.jsonl", *rows), num_train=9, num_test=3, seed=0)
    assert (len(train), len(test)) == (9, 3)
    assert not {row.prompt for row in train} & {row.prompt for row in test}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"x.jsonl:1: no column 'prompt'; it has \['question'\]; expected 'messages', 'text', or"),
        ({"prompt": "a", "completion": " "}, "x.jsonl:1: column 'completion' holds ' '"),
        ({"messages": []}, r"column 'messages' holds \[\]"),
        ({"messages": [{"from": "human", "value": "a"}]}, "has a message .*expected role and content"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"no message of role 'assistant' .* roles are \['user'\]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "without content"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "give both alike"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_documents(write(tmp_path / "x.jsonl", row), num_train=1, num_test=0, seed=0)


def test_gsm8k_is_read_as_prompts_and_completions(shared_data, make_tokenizer):
    keys = {"prompt_key": "question", "completion_key": "answer"}
    train, test = load_documents(str(shared_data / "gsm8k"), num_train=7473, num_test=1319, seed=0, **keys)
    assert (len(train), len(test)) == (7473, 1319)
    sample = sample_of(train[0], make_tokenizer(), chat=True)
    assert make_tokenizer().decode(sample.completion_ids).endswith(f"{train[0].completion[-5:]}<|im_end|>")
