import math
import random
from itertools import chain

import pytest
import torch

from mas_hpc.data.token_tree import pack, split
from mas_hpc.errors import DataError
from mas_hpc.types import Sample


def make(prompt, completion, *, tree="q0", policy="shared", spans=None, advantage=1.0, behavior=(), mask=()):
    return Sample(
        id=f"{tree}/{policy}", tree=tree, agent="solver", policy=policy, prompt_ids=tuple(prompt),
        prompt_spans=tuple(spans or [("", len(prompt))]), completion_ids=tuple(completion),
        behavior_logprobs=tuple(behavior), advantage=advantage, loss_mask=tuple(mask),
    )  # fmt: skip


def packed(*samples, adapters=None, scope="sequence"):
    return pack(samples, adapters=adapters or {}, scope=scope)


def test_siblings_share_their_prompt_and_the_branch_point_predicts_both():
    tree = packed(make([1, 2], [3, 9], advantage=0.5), make([1, 2], [4], advantage=-2.0))
    assert tree.token_T.tolist() == [1, 2, 3]  # 9 and 4 end their paths: never run
    assert tree.position_T.tolist() == [0, 1, 2]
    assert tree.parent_T.tolist() == [-1, 0, 1]
    assert tree.leave_T.tolist() == [3, 3, 3]
    assert tree.predictor_N.tolist() == [1, 2, 1]
    assert tree.target_N.tolist() == [3, 9, 4]
    assert tree.sample_N.tolist() == [0, 0, 1]
    assert tree.advantage_N.tolist() == [0.5, 0.5, -2.0]
    assert tree.num_samples == 2


def test_a_last_token_is_run_when_another_path_continues_through_it():
    tree = packed(make([1], [2]), make([1, 2, 5], [6]))
    assert tree.token_T.tolist() == [1, 2, 5]
    assert tree.predictor_N.tolist() == [0, 2]


def test_a_masked_token_is_run_but_not_trained_and_a_masked_end_is_not_run():
    tree = packed(make([1], [2, 3, 4, 5], behavior=[-1.0, -2.0, -3.0, -4.0], mask=[False, True, True, False]))
    assert tree.token_T.tolist() == [1, 2, 3]
    assert tree.target_N.tolist() == [3, 4]
    assert tree.predictor_N.tolist() == [1, 2]
    assert tree.behavior_logprob_N.tolist() == [-2.0, -3.0]


def test_an_empty_completion_has_no_target_but_keeps_its_row_and_demonstrations_have_no_behavior():
    tree = packed(make([7, 7], []), make([1], [2]))
    assert tree.token_T.tolist() == [1]
    assert tree.sample_N.tolist() == [1]
    assert tree.num_samples == 2
    assert math.isnan(tree.behavior_logprob_N.item())


def test_identical_siblings_are_run_once_and_trained_twice():
    tree = packed(make([1, 2], [3, 4]), make([1, 2], [3, 4]))
    assert len(tree) == 3
    assert tree.predictor_N.tolist() == [1, 2, 1, 2]


def test_sequence_scope_adapts_prompt_and_completion_so_policies_do_not_share():
    solver, critic = make([1, 2], [3, 4], policy="solver"), make([1, 2], [3, 4], policy="critic")
    tree = packed(solver, critic, adapters={"solver": 0, "critic": 1})
    assert tree.adapter_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(packed(solver, critic)) == 3  # without adapters both are the base model


def test_speaker_scope_adapts_what_the_policy_wrote_and_a_cue_predicts_the_first_token():
    first = make([1, 2], [3, 4], policy="solver")
    second = make([1, 2, 3, 4, 8], [5, 6], policy="critic", spans=[("", 2), ("solver", 2), ("", 1)])
    tree = packed(first, second, adapters={"solver": 0, "critic": 1}, scope="speaker")
    assert tree.token_T.tolist() == [1, 2, 3, 4, 8, 5]
    assert tree.adapter_T.tolist() == [-1, -1, 0, 0, -1, 1]
    assert tree.adapter_T[tree.predictor_N].tolist() == [-1, 0, -1, 1]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (make([1], [2], mask=[False]), "loss_mask trains none"),
        (make([], [2]), "empty prompt"),
        (make([1], [2, 3], mask=[True]), "loss_mask has 1 values for 2"),
        (make([1], [2, 3], behavior=[-1.0]), "behavior_logprobs has 1 values for 2"),
        (make([1, 2], [3], spans=[("", 1)]), "add up to 1, not to the 2 prompt"),
        (make([1, 2], []), "none of 1 samples"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(sample, message):
    with pytest.raises(DataError, match=message):
        packed(sample, scope="speaker")


def test_to_moves_every_tensor():
    tree = packed(make([1], [2])).to("meta")
    tensors = [value for value in vars(tree).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 12
    assert all(column.device.type == "meta" for column in tree.column_N.values())
    assert all(tensor.device.type == "meta" for tensor in tensors)


def random_tree(name, seed):
    rng = random.Random(seed)
    state, samples = [rng.randrange(3) for _ in range(5)], []
    for _ in range(3):
        siblings = [[rng.randrange(3) for _ in range(rng.randrange(5))] for _ in range(4)]
        samples += [make(state, sibling, tree=name) for sibling in siblings]
        state = [*state, *siblings[0], 1]
    return samples


def size(samples):
    trained = [sample for sample in samples if sample.completion_ids]
    return len(packed(*trained)) if trained else 0


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("max_tokens", [1, 12, 25, 60, 10_000])
def test_split_loses_no_sample_and_exceeds_the_budget_only_by_one_sample_alone(seed, max_tokens):
    samples = [sample for i in range(4) for sample in random_tree(f"q{i}", 10 * seed + i)]
    forests = split(samples, max_tokens=max_tokens)
    assert sorted(map(id, chain.from_iterable(forests))) == sorted(map(id, samples))
    for forest in forests:
        nonempty = [sample for sample in forest if sample.completion_ids]
        assert size(forest) <= max_tokens or len(nonempty) == 1
    for name in {sample.tree for sample in samples}:
        members = [sample for sample in samples if sample.tree == name]
        if size(members) <= max_tokens:
            assert sum(any(sample.tree == name for sample in forest) for forest in forests) == 1


def test_split_counts_tree_tokens_not_row_tokens():
    samples = [make(range(100), [i, 5]) for i in range(10)]  # 101 + 9 tree tokens, 1010 row tokens
    assert split(samples, max_tokens=110) == [samples]
    assert [len(forest) for forest in split(samples, max_tokens=109)] == [9, 1]


def test_split_counts_a_prompt_once_a_policy_when_adapters_cover_it():
    samples = [make(range(100), [1], policy=policy) for policy in ("a", "b")]
    assert len(split(samples, max_tokens=150)) == 1
    assert len(split(samples, max_tokens=150, adapters={"a": 0, "b": 1})) == 2
