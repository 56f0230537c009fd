"""Pairs and single answers of each format, and where a reward model's score is read."""

from __future__ import annotations

import json
import math

import pytest

from mas_hpc.data.preferences import Pair, Unpaired, load_preferences, pair_samples, scored, unpaired_sample
from mas_hpc.data.token_tree import pack
from mas_hpc.errors import DataError
from mas_hpc.types import Message, Sample

USER, YES, NO = (Message(role=r, content=c) for r, c in (("user", "u"), ("assistant", "yes"), ("assistant", "no")))
WHO = {"policy": "shared", "agent": "solver"}


def write(file, *rows):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def load(file, *rows, num_test=0):
    return load_preferences(write(file, *rows), num_train=99, num_test=num_test, seed=0)


def listed(*messages):
    return [{"role": message.role, "content": message.content} for message in messages]


CHAT = Pair(id="x/1", prompt=(USER,), chosen=(YES,), rejected=(NO,))


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
         Pair(id="x/1", prompt="p", chosen="a", rejected="b", margin=2.0)),
        ({"chosen": "pa", "rejected": "pb"}, Pair(id="x/1", prompt="", chosen="pa", rejected="pb")),
        ({"prompt": listed(USER), "chosen": listed(YES), "rejected": listed(NO)}, CHAT),
        ({"prompt": "u", "chosen": listed(YES), "rejected": listed(NO)}, CHAT),
        ({"chosen": listed(USER, YES), "rejected": listed(USER, NO)}, CHAT),
        ({"prompt": "u", "chosen": listed(USER, YES), "rejected": listed(USER, NO), "score": 1}, CHAT),
    ],
    ids=["explicit", "implicit", "messages", "string prompt of messages", "implicit messages", "repeated prompt"],
)  # fmt: skip
def test_each_format_of_a_pair_is_read(tmp_path, row, pair):
    assert load(tmp_path / "x.jsonl", row)[0] == (pair,)


def test_pairs_of_one_prompt_stay_on_one_side(tmp_path):
    rows = [{"chosen": f"q{n % 3} yes {n}", "rejected": f"q{n % 3} no {n}"} for n in range(9)]
    train, test = load(tmp_path / "x.jsonl", *rows, num_test=3)
    assert (len(train), len(test)) == (6, 3)
    assert not {pair.chosen[:2] for pair in train} & {pair.chosen[:2] for pair in test}


def test_a_pair_is_two_branches_of_one_tree_chosen_first(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    pair = Pair(id="p", prompt="ab", chosen="cd", rejected="ce", margin=0.5)
    chosen, rejected = pair_samples(pair, tokenizer, **WHO)
    assert (chosen.label, chosen.margin, rejected.label, rejected.margin) == (1.0, 0.5, 0.0, 0.0)
    assert chosen.tree == rejected.tree
    assert tokenizer.decode(chosen.prompt_ids) == tokenizer.decode(rejected.prompt_ids) == "<s>ab"
    assert [tokenizer.decode(sample.completion_ids) for sample in (chosen, rejected)] == ["cd<|im_end|>", "ce<|im_end|>"]
    tree = pack([chosen, rejected], adapters={}, scope="sequence")
    assert tokenizer.decode(tree.token_T.tolist()) == "<s>abcde"  # the shared c is run once
    assert tree.label_S.tolist() == [1.0, 0.0]


def test_the_implicit_prompt_of_strings_is_what_their_tokens_share(make_tokenizer):
    tokenizer = make_tokenizer()
    chosen, rejected = pair_samples(Pair(id="p", prompt="", chosen="ab", rejected="abc"), tokenizer, **WHO)
    assert tokenizer.decode(chosen.prompt_ids) == "ab"
    assert [tokenizer.decode(sample.completion_ids) for sample in (chosen, rejected)] == ["<|im_end|>", "c<|im_end|>"]
    with pytest.raises(DataError, match="pair p: chosen and rejected have no first token in common; add a column prompt"):
        pair_samples(Pair(id="p", prompt="", chosen="x", rejected="y"), tokenizer, **WHO)
    with pytest.raises(DataError, match="pair p: without a column prompt"):
        pair_samples(Pair(id="p", prompt="", chosen="ab", rejected="abc"), tokenizer, chat=True, **WHO)


def test_strings_become_messages_on_request(make_tokenizer):
    tokenizer = make_tokenizer()
    strings = Pair(id="x/1", prompt="u", chosen="yes", rejected="no")
    assert pair_samples(strings, tokenizer, chat=True, **WHO) == pair_samples(CHAT, tokenizer, **WHO)


def test_identical_branches_are_refused_all_at_once(tmp_path, make_tokenizer):
    same = {"prompt": "p", "chosen": "a", "rejected": "a"}
    message = r"x.jsonl: 2 rows whose chosen and rejected answers are identical, .*: x/1, x/3; leave them out"
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.jsonl", same, {**same, "rejected": "b"}, same)
    with pytest.raises(DataError, match="1 rows whose chosen and rejected answers are identical"):
        load(tmp_path / "x.jsonl", {"chosen": listed(USER, YES), "rejected": listed(USER, YES)})
    with pytest.raises(DataError, match="pair p: chosen and rejected have the same tokens"):
        pair_samples(Pair(id="p", prompt="p", chosen="a<|im_end|>", rejected="a"), make_tokenizer(), **WHO)


def test_single_answers_have_a_label(tmp_path, make_tokenizer):
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, 0, 1.0)]
    train, _ = load(tmp_path / "x.jsonl", *rows)
    labels = {row.id: row.label for row in train if isinstance(row, Unpaired)}
    assert labels == {"x/1": True, "x/2": False, "x/3": True}
    sample = unpaired_sample(train[0], make_tokenizer(), **WHO)
    assert (sample.label, make_tokenizer().decode(sample.completion_ids)) == (1.0, "a<|im_end|>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"x.jsonl:1: no column 'rejected'; it has \['chosen', 'prompt'\]"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "x.jsonl:1: column 'rejected' holds ''"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "column 'prompt' holds ''"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "1"}, "column 'margin' holds '1'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": math.nan}, "column 'margin' holds nan"),
        ({"chosen": "a", "rejected": listed(USER, YES)}, "some are text and some lists"),
        ({"chosen": listed(USER), "rejected": listed(USER, YES)}, "have 1 of 1 and 2 messages in common"),
        ({"prompt": listed(USER), "chosen": listed(USER, YES), "rejected": listed(USER, NO)}, "begin with .*'user'"),
        ({"prompt": "p", "completion": "a", "label": -100}, "column 'label' holds -100; expected true or false"),
        ({"prompt": "p", "completion": "a", "label": "yes"}, "column 'label' holds 'yes'"),
    ],
)  # fmt: skip
def test_bad_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.jsonl", row)


def test_pairs_and_single_answers_do_not_mix(tmp_path):
    with pytest.raises(DataError, match="some rows are pairs"):
        load(tmp_path / "x.jsonl", {"chosen": "a", "rejected": "b"}, {"prompt": "p", "completion": "a", "label": True})


def sample_of(prompt, completion, **more):
    return Sample(
        id="s", tree="t", agent="solver", policy="shared", prompt_ids=tuple(prompt), prompt_spans=(("", len(prompt)),),
        completion_ids=tuple(completion), **more,
    )  # fmt: skip


def test_g40_a_score_is_read_at_the_last_real_token_which_may_be_the_padding_token():
    end = 1
    tree = pack(
        [scored(sample_of([5, 6], [7, end], label=1.0)), scored(sample_of([5, 6], [8, end, 9]))], adapters={}, scope="sequence"
    )
    assert tree.token_T[tree.predictor_N].tolist() == [end, 9]
    assert tree.position_T[tree.predictor_N].tolist() == [3, 4]
    assert tree.token_T.tolist() == [5, 6, 7, end, 8, end, 9]  # the slots are not run
    assert tree.label_S[0] == 1.0


def test_g11_scores_inside_a_completion_are_read_at_the_tokens_themselves():
    long = scored(sample_of([5], [6, 7, 8, 9], behavior_logprobs=(-1.0,) * 4), at=[1, 3], labels=[1.0, 0.25])
    short = scored(sample_of([5], [6, 7]), at=[1], labels=[0.5])
    tree = pack([long, short], adapters={}, scope="sequence")
    assert tree.token_T[tree.predictor_N].tolist() == [7, 9, 7]
    assert tree.column_N["label"].tolist() == [1.0, 0.25, 0.5]
    assert tree.sample_N.tolist() == [0, 0, 1]
    assert tree.token_T.tolist() == [5, 6, 7, 8, 9]
    assert pack([scored(sample_of([5], []))], adapters={}, scope="sequence").predictor_N.tolist() == [0]
