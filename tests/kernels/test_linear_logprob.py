"""The chunked operation against torch's own log_softmax in float64: values, entropy and gradients."""

import pytest
import torch
from mas_hpc_kernels import chunked, linear_logprob, reference
from torch import Tensor

NUM_TARGETS, VOCABULARY, HIDDEN = 7, 11, 5
IMPLEMENTATIONS = (linear_logprob, reference.linear_logprob)


def problem(dtype: torch.dtype = torch.float64, num_targets: int = NUM_TARGETS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(num_targets, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VD = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator)
    target_N = torch.randint(VOCABULARY, (num_targets,), generator=generator)
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype), target_N


def torch_logprob(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    distribution = torch.distributions.Categorical(logits=hidden_ND @ weight_VD.T / temperature)
    return distribution.log_prob(target_N), distribution.entropy().detach()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_g9_temperature_divides_the_logits_before_the_softmax(implementation):
    weight_VD = torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64)
    hidden_ND = torch.ones(3, 1, dtype=torch.float64)
    logprob_N, _ = implementation(hidden_ND, weight_VD, torch.arange(3), temperature=0.5)
    assert logprob_N.tolist() == pytest.approx([-0.142932, -2.142932, -4.142932], abs=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary(implementation):
    _, entropy_N = implementation(torch.zeros(2, 3), torch.randn(8, 3), torch.tensor([0, 7]))
    assert entropy_N.tolist() == pytest.approx([2.0794415, 2.0794415])


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_entropy_and_gradients_equal_torch_for_every_chunk_size(frozen, temperature, chunk_rows):
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_(not frozen)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N, temperature=temperature, chunk_rows=chunk_rows)
    expected_N, expected_entropy_N = torch_logprob(hidden_ND, weight_VD, target_N, temperature)
    torch.testing.assert_close(logprob_N, expected_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy_N, expected_entropy_N, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((0.3 - logprob_N).exp().sum(), inputs)
    theirs = torch.autograd.grad((0.3 - expected_N).exp().sum(), inputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen):
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_(not frozen)

    def logprob(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_logprob(hidden_ND, weight_VD, target_N, temperature=0.8, chunk_rows=3)[0]

    assert torch.autograd.gradcheck(logprob, (hidden_ND, weight_VD))


@pytest.mark.parametrize("retained_rows", [0, 2, 3, 5, 6, 7])
def test_trained_head_gives_the_same_bits_however_much_it_keeps(monkeypatch: pytest.MonkeyPatch, retained_rows: int):
    """Of chunks of 3, 3 and 1 rows: none, one, two or all."""
    results = []
    for budget in (chunked.RETAIN_ELEMENTS, retained_rows * VOCABULARY):
        monkeypatch.setattr(chunked, "RETAIN_ELEMENTS", budget)
        hidden_ND, weight_VD, target_N = problem()
        weight_VD.requires_grad_()
        logprob_N, entropy_N = linear_logprob(
            hidden_ND, weight_VD, target_N, temperature=0.7, entropy_gradient=True, chunk_rows=3
        )
        loss = (0.3 - logprob_N).exp().sum() - entropy_N.square().sum()
        gradients = torch.autograd.grad(loss, (hidden_ND, weight_VD), retain_graph=True)
        assert all(map(torch.equal, gradients, torch.autograd.grad(loss, (hidden_ND, weight_VD))))  # nothing was overwritten
        results.append((logprob_N, entropy_N, *gradients))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("chunk_rows", [3, None])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("frozen", [True, False])
def test_entropy_bonus_has_the_gradient_of_the_entropy(frozen, temperature, chunk_rows):
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_(not frozen)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    logprob_N, entropy_N = linear_logprob(
        hidden_ND, weight_VD, target_N, temperature=temperature, entropy_gradient=True, chunk_rows=chunk_rows
    )
    expected = torch.distributions.Categorical(logits=hidden_ND @ weight_VD.T / temperature)
    ours = torch.autograd.grad((logprob_N.exp() - 0.1 * entropy_N.square()).sum(), inputs)
    theirs = torch.autograd.grad((expected.log_prob(target_N).exp() - 0.1 * expected.entropy().square()).sum(), inputs)
    for gradient, reference_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference_gradient, rtol=1e-12, atol=1e-12)


def test_trained_head_takes_gradient_where_the_hidden_states_need_none():
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_()
    gradients = []
    for implementation in IMPLEMENTATIONS:
        logprob_N, _ = implementation(hidden_ND.detach(), weight_VD, target_N)
        gradients.append(torch.autograd.grad(logprob_N.sum(), weight_VD)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_entropy_carries_no_gradient_and_is_left_out_on_request(frozen, implementation):
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_(not frozen)
    logprob_N, entropy_N = implementation(hidden_ND, weight_VD, target_N)
    assert logprob_N.requires_grad and not entropy_N.requires_grad
    same_N, nothing = implementation(hidden_ND, weight_VD, target_N, need_entropy=False)
    assert nothing is None
    assert torch.equal(same_N, logprob_N)


def test_without_gradient_the_values_are_the_same():
    hidden_ND, weight_VD, target_N = problem()
    with_gradient = linear_logprob(hidden_ND, weight_VD, target_N, chunk_rows=2)
    with torch.no_grad():
        without = linear_logprob(hidden_ND, weight_VD, target_N, chunk_rows=2)
    assert not without[0].requires_grad
    assert torch.equal(with_gradient[0], without[0]) and torch.equal(with_gradient[1], without[1])


@pytest.mark.parametrize("frozen", [True, False])
def test_no_targets_give_empty_results_and_zero_gradients(frozen):
    hidden_ND, weight_VD, target_N = problem(num_targets=0)
    weight_VD.requires_grad_(not frozen)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N)
    logprob_N.sum().backward()
    assert logprob_N.shape == entropy_N.shape == (0,)
    assert hidden_ND.grad.shape == (0, HIDDEN)
    assert frozen or not weight_VD.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [True, False])
def test_low_precision_inputs_get_a_float32_softmax_and_gradients_in_their_own_type(frozen, dtype):
    hidden_ND, weight_VD, target_N = problem(dtype)
    weight_VD.requires_grad_(not frozen)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N, chunk_rows=3)
    expected_N, _ = torch_logprob(hidden_ND.double(), weight_VD.double(), target_N, 1.0)
    assert logprob_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(logprob_N.double(), expected_N, rtol=0, atol=0.05)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    ours, theirs = torch.autograd.grad(logprob_N.sum(), inputs), torch.autograd.grad(expected_N.sum(), inputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0.1)
