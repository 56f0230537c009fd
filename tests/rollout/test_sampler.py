import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_hpc.rollout.engine import SamplingParams
from mas_hpc.rollout.native.sampler import BLOCK, CANDIDATES, columns, sample, uniforms

LOGITS = torch.tensor([[2.0, 1.0, 0.0]])


def draw(logits, uniform=0.0, **sampling):
    params = columns([SamplingParams(max_new_tokens=1, **sampling)], torch.device("cpu"), logits.shape[1])
    (token,), (logprob,) = sample(logits, params, [uniform])
    return token, logprob


def by_sorting(logits_V, uniform, params):
    """One row by the definition, in float64: sort all, cut, renormalise, walk along the cumulative sum."""
    logits_V = logits_V.double()
    if params.temperature == 0:
        return int(logits_V.argmax()), float(logits_V.log_softmax(-1).max())
    value_V, index_V = (logits_V / params.temperature).sort(descending=True, stable=True)
    value_V[params.top_k or len(value_V) :] = -math.inf
    probability_V = value_V.softmax(-1)
    if params.top_p < 1:
        above_V = probability_V.cumsum(-1) - probability_V
        value_V[(above_V >= params.top_p) & (torch.arange(len(value_V)) > 0)] = -math.inf
    logprob_V = torch.empty_like(value_V).scatter_(0, index_V, value_V).log_softmax(-1)
    cdf_V = logprob_V.exp().cumsum(-1)
    token = int(torch.searchsorted(cdf_V, uniform * cdf_V[-1], right=True))
    return token, float(logprob_V[token])


def agree(logits_BV, rows, uniform_B):
    """Batch, each row alone, and the definition: the first two to the last bit, and the third within rounding."""
    drawn = list(zip(*sample(logits_BV, columns(rows, logits_BV.device, logits_BV.shape[1]), uniform_B), strict=True))
    for logits_V, params, uniform, result in zip(logits_BV, rows, uniform_B, drawn, strict=True):
        alone = sample(logits_V[None], columns([params], logits_V.device, len(logits_V)), [uniform])
        assert result == (alone[0][0], alone[1][0])
        token, logprob = by_sorting(logits_V, uniform, params)
        assert result == (token, pytest.approx(logprob, abs=2e-6))


SAMPLING = st.builds(
    SamplingParams,
    max_new_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 300, 10**6]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.99]),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(SAMPLING, min_size=1, max_size=6),
    vocabulary=st.sampled_from([1, 5, BLOCK - 1, BLOCK, 3 * BLOCK, CANDIDATES, CANDIDATES + 1, 1000, 6001]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_draw_is_the_one_that_sorting_gives_whatever_else_is_in_the_batch(rows, vocabulary, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocabulary, generator=generator) * spread
    agree(logits, rows, uniforms(seed, len(rows), generator))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(SAMPLING, min_size=1, max_size=6), vocabulary=st.sampled_from([7, 300, 700]), seed=st.integers(0, 2**32 - 1)
)
def test_of_equal_logits_the_lowest_tokens_are_kept(rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (len(rows), vocabulary), generator=generator).float() * math.log(2)
    # Sums of equal probabilities hit a round top p exactly, up to rounding, which each side does its own way.
    rows = [replace(params, top_p=min(1.0, params.top_p * math.sqrt(1.01))) for params in rows]
    agree(logits, rows, uniforms(seed, len(rows), generator))


@pytest.mark.parametrize("top_k", [0, 2000, 5000])
def test_a_nucleus_wider_than_the_first_candidates_is_found(top_k):
    logits = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [2.0], [8.0]])
    agree(logits, [SamplingParams(max_new_tokens=1, top_k=top_k, top_p=0.9)] * 3, [0.99, 0.5, 0.999])
    agree(logits, [SamplingParams(max_new_tokens=1, top_k=top_k)] * 3, [0.99, 0.5, 0.999])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_in_single_precision(dtype):
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = [
        SamplingParams(max_new_tokens=1, top_p=p, temperature=t) for p, t in ((1.0, 1.0), (0.9, 0.7), (0.5, 1.0), (1.0, 0.0))
    ]
    agree(logits, rows, [0.1, 0.5, 0.9, 0.3])


def test_rows_that_are_not_finite_say_so_and_leave_the_others_alone():
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(0))
    logits[1, 5], logits[2, 6], logits[3, :] = math.nan, math.inf, -math.inf
    for sampling in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        params = columns([SamplingParams(max_new_tokens=1, **sampling)] * 4, logits.device, 700)
        tokens, logprobs = sample(logits, params, [0.5] * 4)
        assert [math.isfinite(value) for value in logprobs] == [True, False, False, False]
        assert all(0 <= token < 700 for token in tokens)
        assert (tokens[0], logprobs[0]) == draw(logits[:1], 0.5, **sampling)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.86, 0), (0.87, 1), (0.98, 1), (0.985, 2), (0.999, 2)])
def test_temperature_divides_logits_before_the_softmax(uniform, token):
    expected = [-0.142932, -2.142932, -4.142932]  # logits [2, 1, 0] at T = 0.5
    assert draw(LOGITS, uniform, temperature=0.5) == (token, pytest.approx(expected[token], abs=1e-6))


def test_temperature_zero_is_greedy_with_logprobs_of_temperature_one_without_truncation():
    token, logprob = draw(LOGITS, 0.999, temperature=0.0, top_k=1, top_p=0.1)
    assert (token, logprob) == (0, pytest.approx(-0.407606, abs=1e-6))


def test_top_k_renormalises_over_its_survivors():
    probabilities = [math.exp(draw(LOGITS, uniform, top_k=2)[1]) for uniform in (0.0, 0.999)]
    assert probabilities == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    assert draw(logits, 0.999, top_p=0.49) == (1, pytest.approx(0.0))
    assert draw(logits, 0.999, top_p=0.6) == (2, pytest.approx(math.log(0.4 / 0.9)))
    assert draw(logits, 0.0, top_p=0.6) == (1, pytest.approx(math.log(0.5 / 0.9)))


def test_top_p_applies_to_what_top_k_left():
    logits = torch.tensor([[0.3, 0.3, 0.2, 0.2]]).log()
    # Of the two survivors each has a half: 0.5 is reached by the first alone.
    assert draw(logits, 0.999, top_k=2, top_p=0.5) == (0, pytest.approx(0.0))


def test_rows_of_a_batch_keep_their_own_parameters():
    rows = [SamplingParams(max_new_tokens=1, temperature=t, top_k=k) for t, k in ((0.0, 0), (0.5, 0), (1.0, 2), (1.0, 0))]
    logits = LOGITS.repeat(4, 1)
    tokens, logprobs = sample(logits, columns(rows, logits.device, 3), [0.9] * 4)
    alone = [draw(LOGITS, 0.9, temperature=row.temperature, top_k=row.top_k) for row in rows]
    assert list(zip(tokens, logprobs, strict=True)) == alone


def test_frequencies_follow_the_distribution():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(20_000, 50)
    rows = columns([SamplingParams(max_new_tokens=1)] * len(logits), logits.device, 50)
    generator = torch.Generator()
    first = [uniforms(seed, 1, generator)[0] for seed in range(len(logits))]  # neighbouring seeds, as groups have
    tokens, _ = sample(logits, rows, first)
    frequency = torch.bincount(torch.tensor(tokens), minlength=50) / len(logits)
    assert (frequency - logits[0].softmax(-1)).abs().max() < 0.01


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 500]] = 0.0
    assert {draw(logits, u)[0] for u in uniforms(0, 200, torch.Generator())} == {3, 500}
    assert draw(logits, uniform=1 - 2**-30)[0] == 500


def test_a_stream_is_a_function_of_the_seed_and_a_longer_one_begins_alike():
    generator = torch.Generator()
    short = uniforms(7, 3, generator)
    uniforms(8, 50, generator)
    assert uniforms(7, 10, generator)[:3] == short
