"""The operation in float64 on the torch backend against torch's own log_softmax: values, entropy, gradients, shards."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mas_hpc_kernels import LogitRule, VocabularyShard, chunked, linear_logprob, reference
from torch import Tensor

NUM_TARGETS, VOCABULARY, HIDDEN = 7, 11, 5
IMPLEMENTATIONS = (linear_logprob, reference.linear_logprob)


def problem(dtype: torch.dtype = torch.float64, num_targets: int = NUM_TARGETS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(num_targets, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VD = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator)
    target_N = torch.randint(VOCABULARY, (num_targets,), generator=generator)
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype), target_N


@pytest.fixture(params=[(1, 2), (3, 4), (3, 100), None], ids=["single_rows", "uneven", "whole_rows", "one_block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks of 7 targets and 11 tokens; nothing is kept for the backward, except of one block."""
    if request.param:
        rows, columns = request.param
        for name, value in {"MIN_ROWS": rows, "BLOCK_ELEMENTS": 0, "BLOCK_VOCABULARY": columns, "KEPT_ELEMENTS": 0}.items():
            monkeypatch.setattr(chunked, name, value)


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


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_entropy_and_gradients_equal_torch_for_every_block_size(frozen, temperature, blocks):
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_(not frozen)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N, temperature=temperature)
    expected_N, expected_entropy_N = torch_logprob(hidden_ND, weight_VD, target_N, temperature)
    torch.testing.assert_close(logprob_N, expected_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy_N, expected_entropy_N, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((0.3 - logprob_N).exp().sum(), inputs)
    theirs = torch.autograd.grad((0.3 - expected_N).exp().sum(), inputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["plain", "biased", "capped"])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen, rule, blocks):
    hidden_ND, weight_VD, target_N = problem()
    bias_V = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)
    for tensor in (weight_VD, bias_V):
        tensor.requires_grad_(not frozen)

    def results(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        known = {"plain": LogitRule(), "biased": LogitRule(bias_V=bias_V), "capped": LogitRule(bias_V=bias_V, softcap=3.0)}
        return linear_logprob(hidden_ND, weight_VD, target_N, temperature=0.8, entropy_gradient=True, rule=known[rule])

    assert torch.autograd.gradcheck(results, (hidden_ND, weight_VD, bias_V))


def test_trained_head_gives_the_same_bits_whether_or_not_it_keeps_logits(monkeypatch: pytest.MonkeyPatch):
    results = []
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 0)
    monkeypatch.setattr(chunked, "MIN_ROWS", 3)
    for budget in (NUM_TARGETS * VOCABULARY, NUM_TARGETS * VOCABULARY - 1):
        monkeypatch.setattr(chunked, "KEPT_ELEMENTS", budget)
        hidden_ND, weight_VD, target_N = problem()
        weight_VD.requires_grad_()
        logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N, temperature=0.7, entropy_gradient=True)
        loss = (0.3 - logprob_N).exp().sum() - entropy_N.square().sum()
        gradients = torch.autograd.grad(loss, (hidden_ND, weight_VD), retain_graph=True)
        assert all(map(torch.equal, gradients, torch.autograd.grad(loss, (hidden_ND, weight_VD))))  # nothing was overwritten
        results.append((logprob_N, entropy_N, *gradients))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("frozen", [True, False])
def test_entropy_bonus_has_the_gradient_of_the_entropy(frozen, temperature, blocks):
    hidden_ND, weight_VD, target_N = problem()
    weight_VD.requires_grad_(not frozen)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N, temperature=temperature, entropy_gradient=True)
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


def test_without_gradient_the_values_are_the_same(blocks):
    hidden_ND, weight_VD, target_N = problem()
    with_gradient = linear_logprob(hidden_ND, weight_VD, target_N)
    with torch.no_grad():
        without = linear_logprob(hidden_ND, weight_VD, target_N)
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


@pytest.mark.parametrize("wrong", [-100, VOCABULARY])
def test_a_target_that_the_head_has_no_row_for_is_refused(wrong):
    """It would have a logit of 0, and so a log-probability that looks like any other."""
    hidden_ND, weight_VD, target_N = problem()
    target_N[3] = wrong
    with pytest.raises(ValueError, match=rf"^target {wrong} is no row of the head, which has {VOCABULARY}: "):
        linear_logprob(hidden_ND, weight_VD, target_N)


def test_a_negative_target_is_in_no_shard():
    hidden_ND, weight_VD, target_N = problem()
    shard = VocabularyShard(start=VOCABULARY, reduce=lambda tensor, how: tensor)
    linear_logprob(hidden_ND, weight_VD, target_N, rule=LogitRule(shard=shard))  # all in another
    target_N[3] = -100
    with pytest.raises(ValueError, match="target -100"):
        linear_logprob(hidden_ND, weight_VD, target_N, rule=LogitRule(shard=shard))


def test_a_mask_that_the_soft_cap_would_lift_is_refused():
    hidden_ND, weight_VD, target_N = problem()
    bias_V = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([3]), -torch.inf)
    with pytest.raises(ValueError, match=r"bias_V has -inf and softcap=30.0"):
        linear_logprob(hidden_ND, weight_VD, target_N, rule=LogitRule(bias_V=bias_V, softcap=30.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_N": torch.zeros(NUM_TARGETS, dtype=torch.int32)}, "one int64 target"),  # SYCL would read 8 bytes of each
        ({"target_N": torch.zeros(1, dtype=torch.int64)}, "one int64 target"),  # would be every row's
        ({"weight_VD": torch.zeros(VOCABULARY, HIDDEN)}, "another type"),
        ({"weight_VD": torch.zeros(VOCABULARY, HIDDEN + 1, dtype=torch.float64)}, r"not \[N, D\]"),
        ({"rule": LogitRule(bias_V=torch.zeros(1))}, "one bias"),  # would be every token's
        ({"rule": LogitRule(softcap=-1.0)}, "positive"),
    ],
    ids=["int32 targets", "one target", "type", "width", "one bias", "negative cap"],
)
def test_inputs_that_do_not_fit_together_are_refused(changed, message):
    given = dict(zip(("hidden_ND", "weight_VD", "target_N"), problem(), strict=True)) | changed
    with pytest.raises(AssertionError, match=message):
        linear_logprob(**given)


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_low_precision_inputs_get_a_float32_softmax_and_gradients_in_their_own_type(frozen, product, monkeypatch):
    """On a CPU that multiplies bfloat16 and on one that does not: there nothing is rounded but the results."""
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, device: product)
    hidden_ND, weight_VD, target_N = problem(torch.bfloat16)
    weight_VD.requires_grad_(not frozen)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N)
    expected_N, _ = torch_logprob(hidden_ND.double(), weight_VD.double(), target_N, 1.0)
    assert logprob_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(logprob_N.double(), expected_N, rtol=0, atol=1e-5 if product == torch.float32 else 0.05)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    ours, theirs = torch.autograd.grad(logprob_N.sum(), inputs), torch.autograd.grad(expected_N.sum(), inputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0.02 if product == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("dtype", "capabilities", "product"),
    [
        (torch.bfloat16, {"avx512_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"avx2": True}, torch.float32),
        (torch.float16, {"avx512_bf16": True}, torch.float32),
        (torch.float32, {}, torch.float32),
        (torch.float64, {}, torch.float64),
    ],
)
def test_sixteen_bits_are_multiplied_only_by_processors_that_can(dtype, capabilities, product, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert chunked.product_dtype(dtype, torch.device("cpu")) == product
    assert chunked.product_dtype(dtype, torch.device("cuda")) == dtype


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_shards_of_a_vocabulary_give_the_results_of_the_whole(frozen, softcap):
    """Two ranks as threads, with 4 and 7 of 11 rows; every collective of one meets the other's."""
    hidden_ND, weight_VD, target_N = problem()
    whole = with_gradients(hidden_ND, weight_VD, target_N, frozen=frozen, softcap=softcap)
    place, barrier = [None, None], threading.Barrier(2, timeout=60)

    def rank(number: int) -> tuple[Tensor, ...]:
        def reduce(tensor: Tensor, how: str) -> Tensor:
            place[number] = tensor
            barrier.wait()
            total = place[0] + place[1] if how == "sum" else torch.maximum(*place)
            barrier.wait()
            return total

        start, stop = ((0, 4), (4, VOCABULARY))[number]
        shard = VocabularyShard(start=start, reduce=reduce)
        return with_gradients(hidden_ND, weight_VD[start:stop], target_N, frozen=frozen, softcap=softcap, shard=shard)

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(rank, range(2)))
    for results in ranks:
        for ours, expected in zip(results[:3], whole[:3], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if not frozen:
        torch.testing.assert_close(torch.cat([results[3] for results in ranks]), whole[3], rtol=1e-12, atol=1e-12)


def with_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *,
    frozen: bool, softcap: float, shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Log-probability, entropy, and the gradients of a loss of both."""
    hidden_ND, weight_VD = hidden_ND.detach().requires_grad_(), weight_VD.clone().requires_grad_(not frozen)
    rule = LogitRule(softcap=softcap, shard=shard)
    logprob_N, entropy_N = linear_logprob(hidden_ND, weight_VD, target_N, temperature=0.7, rule=rule)
    inputs = (hidden_ND,) if frozen else (hidden_ND, weight_VD)
    return logprob_N.detach(), entropy_N, *torch.autograd.grad((0.3 - logprob_N).exp().sum(), inputs)
