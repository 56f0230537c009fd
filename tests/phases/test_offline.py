"""What KTO compares with."""

from __future__ import annotations

from mas_hpc.phases.offline import _mismatched
from mas_hpc.types import Sample


def sample(prompt: int, completion: int) -> Sample:
    return Sample(
        id="s", tree=str(prompt), agent="a", policy="p", prompt_ids=(prompt,), prompt_spans=(("", 1),),
        completion_ids=(completion,),
    )  # fmt: skip


def test_g36_the_kl_of_kto_is_of_completions_of_other_prompts() -> None:
    both = [sample(1, 11), sample(1, 12), sample(2, 21), sample(2, 22)]  # two answers to each prompt, as pairs give them
    assert [(s.prompt_ids, s.completion_ids) for s in _mismatched(both)] == [
        ((1,), (21,)), ((1,), (22,)), ((2,), (11,)), ((2,), (12,)),
    ]  # fmt: skip
    odd = [sample(number, 10 * number) for number in (1, 2, 3)]
    assert [s.completion_ids for s in _mismatched(odd)] == [(20,), (30,), (10,)]
