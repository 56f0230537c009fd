import math

import pytest
import torch

from mas_hpc.rollout.engine import SamplingParams
from mas_hpc.rollout.native.sampler import columns, sample, uniforms

LOGITS = torch.tensor([[2.0, 1.0, 0.0]])


def draw(logits, uniform=0.0, **sampling):
    params = columns([SamplingParams(max_new_tokens=1, **sampling)], torch.device("cpu"), logits.shape[1])
    (token,), (logprob,) = sample(logits, params, [uniform])
    return token, logprob


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
